#!/usr/bin/env bash
# Visual entailment from data to report: scenes and hypotheses -> teacher -> student -> yes, no or maybe.
#
#   bash run_scripts/snli_ve.sh [KEY=value ...]
#
# pipeline.sh lists the settings of all tasks. ADD_CAPTION=1 adds the caption to the input. The default is 1, but 0 on
# scenes, whose captions alone contain the answer.

name=snli_ve
task=snli_ve
image_column=2
text_columns=3,4,5
task_keys="ADD_CAPTION"
teacher_loss=(adjust_label_smoothed_cross_entropy)
scoring=entailment

sizes() {
  if ((!nano)); then
    defaults PATCH_IMAGE_SIZE=480 EPOCHS=5 TEACHER_LR=5e-5 STUDENT_LR=5e-5
  fi
  [[ -z ${DATA:-} ]] || defaults ADD_CAPTION=1
  case $PRESET in
    quick)
      defaults PATCH_IMAGE_SIZE=64 TRAIN=24000 VALID=500 TEST=1000 NOUNS=6 OBJECTS=2 \
        TEACHER_UPDATES=800 STUDENT_UPDATES=200
      ;;
    full) defaults TRAIN=64000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=8000 STUDENT_UPDATES=3000 ;;
  esac
  # At higher learning rates, the model guesses between yes and no for thousands of updates.
  defaults QUERIES=3 ADD_CAPTION=0 BATCH=128 TEACHER_LR=5e-4 STUDENT_LR=5e-4 DROPOUT=0
}

task_options() {
  task_options=(--selected-cols 0,2,3,4,5 --eval-acc)
  ((!ADD_CAPTION)) || task_options+=(--add-caption)
  answer_options
}

source "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh"
