#!/usr/bin/env bash
# Visual question answering from data to report: easy-VQA -> teacher -> student -> its answers.
#
#   bash run_scripts/vqa.sh [KEY=value ...]
#
# pipeline.sh lists the settings of all tasks. Without DATA the questions are those of the package easy-vqa, in its official
# splits. TRAIN, VALID and TEST are numbers of rows to take from the start of each split. If DATA holds a list of all
# answers, trainval_ans2label.pkl, the teacher chooses from it.

source "$(dirname "${BASH_SOURCE[0]}")/questions.sh"
name=vqa
scoring=vqa

sizes() {
  ((nano)) || published_sizes
  case $PRESET in
    quick) defaults PATCH_IMAGE_SIZE=64 VALID=1000 BATCH=128 TEACHER_UPDATES=900 STUDENT_UPDATES=450 ;;
    full) defaults PATCH_IMAGE_SIZE=128 BATCH=128 TEACHER_UPDATES=2500 STUDENT_UPDATES=2500 ;;
  esac
  defaults QUERIES=6
}

make_data() {
  local split rows
  narvl data easy-vqa --out "$OUT/easy_vqa"
  mkdir -p "$OUT/data/$task"
  cp "$OUT/easy_vqa/trainval_ans2label.pkl" "$OUT/data/$task"
  for split in "train=${TRAIN:-}" "val=${VALID:-}" "test=${TEST:-}"; do
    rows=${split#*=} split=${split%=*}
    head -n "${rows:--0}" "$OUT/easy_vqa/$split.tsv" >"$OUT/data/$task/$split.part"
    mv "$OUT/data/$task/$split.part" "$OUT/data/$task/${split/val/valid}.tsv"
  done
}

source "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh"
