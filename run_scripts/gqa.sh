#!/usr/bin/env bash
# Questions in the manner of GQA from nothing to a report: scenes and questions -> teacher -> student -> its answers.
#
#   bash run_scripts/gqa.sh [KEY=value ...]
#
# Settings of every task are listed in road.sh. Where DATA holds trainval_ans2label.pkl, a list of all answers, the
# teacher keeps to it.

source "$(dirname "${BASH_SOURCE[0]}")/questions.sh"
name=gqa
scoring=gqa

sizes() {
  ((nano)) || published_sizes
  case $PRESET in
    quick) defaults TRAIN=16000 VALID=200 TEST=1000 NOUNS=40 OBJECTS=2 TEACHER_UPDATES=3000 STUDENT_UPDATES=3000 ;;
    full) defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 TEACHER_UPDATES=8000 STUDENT_UPDATES=8000 ;;
  esac
  defaults QUERIES=6
}

source "$(dirname "${BASH_SOURCE[0]}")/road.sh"
