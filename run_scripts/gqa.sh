#!/usr/bin/env bash
# Questions as in GQA from data to report: scenes and questions -> teacher -> student -> its answers.
#
#   bash run_scripts/gqa.sh [KEY=value ...]
#
# pipeline.sh lists the settings of all tasks. If DATA holds trainval_ans2label.pkl, a list of all answers, the teacher
# chooses from it.

source "$(dirname "${BASH_SOURCE[0]}")/questions.sh"
name=gqa
scoring=gqa

sizes() {
  ((nano)) || published_sizes
  case $PRESET in
    quick)
      defaults PATCH_IMAGE_SIZE=64 TRAIN=20000 VALID=500 TEST=1000 NOUNS=6 OBJECTS=2 \
        TEACHER_UPDATES=800 STUDENT_UPDATES=300
      ;;
    full) defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=6000 STUDENT_UPDATES=3000 ;;
  esac
  # At higher learning rates, the model guesses yes or no for thousands of updates.
  defaults QUERIES=6 BATCH=128 TEACHER_LR=5e-4 STUDENT_LR=5e-4 DROPOUT=0
}

source "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh"
