#!/usr/bin/env bash
# Questions in the manner of GQA from nothing to a report: scenes and questions -> teacher -> student -> its answers.
#
#   bash run_scripts/gqa.sh [KEY=value ...]
#
# Settings of every task are listed in road.sh. Where DATA holds trainval_ans2label.pkl, a list of all answers, the
# teacher keeps to it.

name=gqa
task=vqa_gen
image_column=5
text_columns=2,3
teacher_loss=(adjust_label_smoothed_cross_entropy)
scoring=gqa

sizes() {
  if ((!nano)); then # the paper distils questions
    defaults PATCH_IMAGE_SIZE=480 EPOCHS=10 TEACHER_LR=5e-5 STUDENT_LR=5e-5 WARMUP_RATIO=0.04 EMA_DECAY=0.9999 DISTIL=1
  fi
  case $PRESET in
    quick) defaults TRAIN=16000 VALID=200 TEST=1000 NOUNS=40 OBJECTS=2 TEACHER_UPDATES=3000 STUDENT_UPDATES=3000 ;;
    full) defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=8000 STUDENT_UPDATES=8000 ;;
  esac
  defaults QUERIES=6
}

make_data() { make_scenes; }

task_options() {
  task_options=(--selected-cols 0,5,2,3,4 --eval-acc)
  question_options
}

source "$(dirname "${BASH_SOURCE[0]}")/road.sh"
