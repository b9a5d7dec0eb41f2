#!/usr/bin/env bash
# Grounding from data to report: scenes and a phrase for an object -> teacher -> student -> its box.
#
#   bash run_scripts/refcoco.sh [KEY=value ...]
#
# pipeline.sh lists the settings of all tasks.

name=refcoco
task=refcoco
image_column=4
text_columns=2
teacher_loss=(label_smoothed_cross_entropy)
scoring=grounding

sizes() {
  if ((!nano)); then # 10 epochs; refcocog: STUDENT_LR=3e-5 EPOCHS=12
    defaults PATCH_IMAGE_SIZE=512 EPOCHS=10 TEACHER_LR=5e-5 STUDENT_LR=5e-5
  fi
  case $PRESET in
    quick)
      defaults PATCH_IMAGE_SIZE=96 TRAIN=14000 VALID=500 TEST=1000 NOUNS=40 OBJECTS=2 \
        TEACHER_UPDATES=700 STUDENT_UPDATES=500
      ;;
    full) defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=6000 STUDENT_UPDATES=4000 ;;
  esac
  # A box has four bins, and equal neighbours need a blank in between. 7 queries fit every box. A bin has 1.5 to 2
  # pixels.
  defaults QUERIES=7 NUM_BINS=64 BATCH=64 TEACHER_LR=1e-3 STUDENT_LR=2e-3 SCORE_WEIGHT=10 DROPOUT=0
  defaults STUDENT_DROPOUT=0.1 # the student starts from the teacher's weights, which were trained on the same rows
}

task_options() {
  task_options=(--selected-cols 0,4,2,3 --max-image-size "$PATCH_IMAGE_SIZE" --eval-acc)
  local four_bins="--min-len 4 --max-len-a 0 --max-len-b 4"
  teachers=("teacher_beam5=--beam 5 $four_bins" "teacher_greedy=--beam 1 $four_bins")
  distil_options=(--beam "$BEAM") latency_options=()
  student_options=()
}

source "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh"
