#!/usr/bin/env bash
# Captioning from data to report: scenes -> teacher -> distilled captions -> student -> its captions.
#
#   bash run_scripts/caption.sh [KEY=value ...]
#
# pipeline.sh lists the settings of all tasks. A scene's caption has at most 20 words, and each word is one token of the
# vocabulary. MAX_LEN tokens are therefore enough for the teacher, and QUERIES for the student.

name=caption
task=caption
image_column=4
text_columns=2
task_keys="MAX_LEN NO_REPEAT_NGRAM"
teacher_loss=(label_smoothed_cross_entropy)
scoring=coco_caption

sizes() {
  if ((!nano)); then # 5 epochs of COCO's captions; the paper has QUERIES=30 in its text and 20 in its code
    defaults PATCH_IMAGE_SIZE=480 EPOCHS=5 TEACHER_LR=1e-5 STUDENT_LR=1e-5 QUERIES=20 MAX_LEN=16 NO_REPEAT_NGRAM=3
  fi
  case $PRESET in
    smoke) defaults MAX_LEN=8 ;;
    quick)
      defaults PATCH_IMAGE_SIZE=96 TRAIN=6000 VALID=500 TEST=1000 NOUNS=24 OBJECTS=2 \
        TEACHER_UPDATES=600 DROPOUT=0 STUDENT_UPDATES=500 STUDENT_DROPOUT=0.1
      ;;
    full)
      defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=6000 STUDENT_UPDATES=10000 \
        QUERIES=32
      ;;
  esac
  defaults BIGRAM_WEIGHT=10 NBEST=5 DISTIL=1 QUERIES=24 MAX_LEN=22 NO_REPEAT_NGRAM=0
}

task_options() {
  local eval_args="\"max_len_b\": $MAX_LEN, \"no_repeat_ngram_size\": $NO_REPEAT_NGRAM}"
  task_options=(--selected-cols 0,4,2 --eval-cider --eval-args "{\"beam\": $BEAM, $eval_args")
  local decoding="--max-len-b $MAX_LEN --no-repeat-ngram-size $NO_REPEAT_NGRAM"
  teachers=("teacher_beam5=--beam 5 $decoding" "teacher_greedy=--beam 1 $decoding")
  # shellcheck disable=SC2206 # options are words
  latency_options=($decoding)
  distil_options=(--beam "$BEAM" --nbest "$NBEST" "${latency_options[@]}")
  # The student may learn any of several captions. Otherwise its queries, which choose independently, mix wordings.
  # The student outputs its most probable path. A beam of 5 takes nearly twice as long, with hardly better captions.
  student_options=(--any-reference --eval-args "{\"beam\": 1, $eval_args") student_words=(--beam 1 "${latency_options[@]}")
}

source "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh"
