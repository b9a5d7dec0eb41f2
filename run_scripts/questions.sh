# Settings of the scripts about questions, vqa.sh and gqa.sh.
# shellcheck shell=bash

task=vqa_gen
image_column=5
text_columns=2,3
teacher_loss=(adjust_label_smoothed_cross_entropy)

# published_sizes: sets the published recipe. The paper distils questions.
published_sizes() {
  defaults PATCH_IMAGE_SIZE=480 EPOCHS=10 TEACHER_LR=5e-5 STUDENT_LR=5e-5 WARMUP_RATIO=0.04 EMA_DECAY=0.9999 DISTIL=1
}

# task_options: if a list of answers is beside the questions, the teacher chooses from it. Otherwise it may output any
# text.
task_options() {
  local answers
  answers=$(dirname "$test_tsv")/trainval_ans2label.pkl
  task_options=(--selected-cols 0,5,2,3,4 --eval-acc)
  answer_options
  if [[ -e $answers ]]; then
    task_options+=(--ans2label-file "$answers")
    distil_options=(--ans2label-file "$answers")
    latency_options=("${distil_options[@]}") report_options=("${distil_options[@]}")
  else
    task_options+=(--val-inference-type beamsearch)
    teachers=("${teachers[1]}")
  fi
}
