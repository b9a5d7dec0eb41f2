# The pipeline of all tasks: data -> teacher -> (distilled targets ->) student -> generation -> scores, latency, report.
# The script of a task, such as caption.sh, sets what differs between tasks and sources this file.
# shellcheck shell=bash
#
# Settings of all tasks, KEY=value, with defaults in parentheses:
#
#   PRESET     smoke, quick or full: the sizes below (quick)
#   OUT        folder of the run (runs/NAME_PRESET_seedSEED). A stage is skipped if its output exists
#   SEED       seed of the scenes and of training (1)
#   ARCH       architecture of the student. The teacher is ofa_ of the same size (narvl_nano)
#   DATA       folder with {train,valid,test}.tsv in OFA's columns, also with OFA's file names (embedded data)
#   TEACHER    checkpoint of a trained teacher (a teacher is trained)
#   INIT       checkpoint to train the teacher from, such as a pretrained OFA (random weights)
#   BPE        folder of the vocabulary: dict.txt of a published teacher, or spm.model (a vocabulary is trained)
#   DISTIL     1: the student learns the teacher's outputs. 0: it learns the targets of the data
#   BASELINES  1: also train a student on the other of these two, and one with cross entropy (0)
#   EPOCHS     number of passes over the training file, instead of TEACHER_UPDATES and STUDENT_UPDATES
#   AMP        1: train in mixed precision (1 for nano on processors that multiply in bfloat16, else 0)
#   EMA_DECAY  decay of averaged weights, which then replace the trained ones (no averaging)
#   PROCESSES  number of processes that share a batch in training on CPU (2, or 1 on a single core or with a GPU)
#   THREADS    number of torch's threads per process (1)
#   WORKERS    number of workers per process that read and decode images (1). Nano's features need none
#
# Further settings are sizes of the data, numbers of updates and learning rates. Their defaults depend on the preset and
# are listed in the task's script.
#
# The script of a task sets these variables and defines these functions:
#
#   name            name in the run's folder and, if DATA has OFA's file names, in these
#   task            task of fairseq
#   image_column    number (from 0) of the TSV column with the image
#   text_columns    numbers of the columns with input and output texts, to train a vocabulary on
#   task_keys       settings that only this task has
#   sizes           sets defaults by ARCH and PRESET
#   make_data       writes the embedded data to $OUT/data/$task. The default is make_scenes
#   scoring         scorer of fairseq-generate
#   teacher_loss    array: the teacher's criterion and its options
#   task_options    sets these arrays:
#                     task_options     options of fairseq's programs
#                     teachers         NAME=OPTIONS for each way in which the teacher generates
#                     distil_options   options of the distillation
#                     latency_options  options of the latency benchmark
#                     student_options  options of the student's training
#                     student_words    options of the student's generation

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run_scripts/common.sh"
[[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
export NARVL_RUN=1 # only this script, not its programs, then prints that it was interrupted
trap 'end_programs 2>/dev/null' EXIT # ends background programs
trap 'end_run 130 interrupted' INT
trap 'end_run 143 terminated' TERM
trap 'end_run 129 "the terminal was closed"' HUP
command -v narvl >/dev/null || die "narvl is not installed; run: make setup"

KEPT_KEYS="PRESET SEED ARCH DATA TEACHER INIT BPE TRAIN VALID TEST NOUNS OBJECTS VOCAB_SIZE PATCH_IMAGE_SIZE
 DISTIL EPOCHS TEACHER_UPDATES TEACHER_LR LABEL_SMOOTHING STUDENT_UPDATES STUDENT_LR BIGRAM_WEIGHT SCORE_WEIGHT
 BATCH UPDATE_FREQ DROPOUT STUDENT_DROPOUT WARMUP_RATIO EMA_DECAY ADAM_BETA2 AMP QUERIES BEAM NBEST WORDS NUM_BINS
 TIMED ${task_keys:-}"
KEPT_KEYS=${KEPT_KEYS//$'\n'/}
read_settings "$KEPT_KEYS OUT BASELINES PROCESSES THREADS WORKERS SKIP_BAD_ROWS" "$@"

# --- Settings -------------------------------------------------------------------------------------------------------

defaults PRESET=quick SEED=1 ARCH=narvl_nano BASELINES=0 THREADS=1 WORKERS=1
# nproc prints at most OMP_NUM_THREADS, which only sets the number of threads of one program.
if (($(env -u OMP_NUM_THREADS nproc) == 1)) || command -v nvidia-smi >/dev/null; then
  defaults PROCESSES=1
else
  defaults PROCESSES=2
fi
[[ $ARCH == narvl_?* ]] || die "ARCH=$ARCH: give a student's architecture, such as narvl_nano or narvl_base"
[[ $ARCH == *_nano ]] && nano=1 || nano=0
teacher_arch=ofa_${ARCH#narvl_}
if ((nano)) && ! command -v nvidia-smi >/dev/null && grep -qswm1 'avx512_bf16\|amx_bf16' /proc/cpuinfo; then
  defaults AMP=1
fi
[[ " smoke quick full " == *" $PRESET "* ]] || die "PRESET=$PRESET: choose smoke, quick or full"
((nano)) || [[ -n ${BPE:-} ]] || die "ARCH=$ARCH: give BPE=FOLDER with the dict.txt of the published checkpoints"

if ((!nano)); then # the recipe of the published models, for one GPU
  defaults BATCH=16 UPDATE_FREQ=8 LABEL_SMOOTHING=0.1 ADAM_BETA2=0.999 NUM_BINS=1000 \
    BIGRAM_WEIGHT=0 SCORE_WEIGHT=0 DROPOUT=0.1
fi
sizes
if [[ $PRESET == smoke ]]; then # a test that all programs run; nothing is learned
  defaults TRAIN=32 VALID=8 TEST=8 NOUNS=8 OBJECTS=1 PATCH_IMAGE_SIZE=64 VOCAB_SIZE=200 \
    BATCH=16 TEACHER_UPDATES=4 TEACHER_LR=1e-3 STUDENT_UPDATES=4 STUDENT_LR=1e-3 BEAM=5 TIMED=4
fi
defaults PATCH_IMAGE_SIZE=128 VOCAB_SIZE=1000 BATCH=32 TEACHER_LR=2e-3 STUDENT_LR=2e-3 BIGRAM_WEIGHT=0 SCORE_WEIGHT=0 \
  BEAM=5 NBEST=1 SKIP_BAD_ROWS=0 UPDATE_FREQ=1 AMP=0 DROPOUT=0.1 LABEL_SMOOTHING=0 ADAM_BETA2=0.98 \
  WARMUP_RATIO=0.06 WORDS=20 NUM_BINS=0 DISTIL=0 TIMED=50 OUT="runs/${name}_${PRESET}_seed$SEED"
defaults STUDENT_DROPOUT="$DROPOUT"

((BATCH % PROCESSES == 0)) || die "BATCH=$BATCH: is not divisible by PROCESSES=$PROCESSES, which share each batch"
for key in DATA BPE TEACHER INIT; do # paths become absolute, so a run does not depend on the current folder
  [[ -z ${!key:-} ]] || [[ -e ${!key} ]] || die "$key=${!key}: no such file or folder"
  [[ -z ${!key:-} ]] || printf -v "$key" '%s' "$(realpath "${!key}")"
done
[[ -z ${TEACHER:-}${INIT:-} || -n ${BPE:-} ]] ||
  die "${TEACHER:-$INIT}: give the vocabulary it was trained with, too: BPE=FOLDER"

# find_split NAME...: prints the first of the files NAME.tsv and ${name}_NAME.tsv that DATA holds.
find_split() {
  local split file
  for split in "$@"; do
    for file in "$DATA/$split.tsv" "$DATA/${name}_$split.tsv"; do
      if [[ -e $file ]]; then
        echo "$file"
        return
      fi
    done
  done
  die "DATA=$DATA: holds none of $*, each with .tsv, as it is or after ${name}_"
}

OUT=$(realpath -m "$OUT")
if [[ -n ${DATA:-} ]]; then
  train_tsv=$(find_split train stage1_train)
  valid_tsv=$(find_split valid val dev)
  test_tsv=$(find_split test testA testdev)
else
  train_tsv=$OUT/data/$task/train.tsv valid_tsv=$OUT/data/$task/valid.tsv test_tsv=$OUT/data/$task/test.tsv
fi

mkdir -p "$OUT"
lock_run "$OUT"
keep_settings "$KEPT_KEYS" "$OUT/settings.txt"
# The C library keeps freed memory instead of asking the system again for every large tensor. This saves a fifth of the
# time of a training step, and half of the time of a pass over many images.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=$((1 << 33))
# Waiting threads sleep. If they spin on a busy machine, two threads are many times slower than one.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$THREADS PYTHONWARNINGS=ignore::FutureWarning
cores=$((PROCESSES * THREADS))
((nano)) && answered=128 || answered=$BATCH # batch size of inference
user_dir=$(narvl path)

# --- Data -----------------------------------------------------------------------------------------------------------

# make_scenes: draws images with rows of the task.
make_scenes() {
  narvl data scenes --out "$OUT/data" --tasks "$task" --seed "$SEED" --size "$PATCH_IMAGE_SIZE" \
    --train "$TRAIN" --valid "$VALID" --test "$TEST" --nouns "$NOUNS" --max-objects "$OBJECTS"
}

if [[ -z ${DATA:-} ]]; then
  declare -F make_data >/dev/null || make_data() { make_scenes; }
  stage data "$test_tsv" make_data
fi

vocab=${BPE:-$OUT/vocab}
if [[ -z ${BPE:-} ]]; then
  stage vocab "$vocab/spm.model" narvl vocab "$train_tsv" --out "$vocab" --vocab-size "$VOCAB_SIZE" \
    --column "$text_columns"
fi

# answer_options: sets how a teacher chooses from a closed list: the best of all answers, or a beam search among them.
answer_options() {
  teachers=("teacher_allcand=--val-inference-type allcand" "teacher_beam5=--val-inference-type beamsearch --beam 5
    --unnormalized")
  distil_options=() latency_options=() student_options=()
}

report_options=() student_words=()
task_options
options=(--user-dir "$user_dir" --task "$task" --bpe-dir "$vocab" --max-tgt-length "$WORDS"
  --patch-image-size "$PATCH_IMAGE_SIZE" --num-bins "$NUM_BINS" --seed "$SEED" --num-workers "$WORKERS"
  --skip-bad-rows "$SKIP_BAD_ROWS" "${task_options[@]}")

# The backbone of nano is frozen. Its features are computed once, and training reads them instead of images.
if ((nano)); then
  for split in train valid; do
    images_tsv=${split}_tsv
    stage "features $split" "$OUT/features/$split.tsv" \
      env OMP_NUM_THREADS="$cores" narvl features "${!images_tsv}" "$OUT/features/$split.tsv" --arch "$ARCH" \
      --image-column "$image_column" --patch-image-size "$PATCH_IMAGE_SIZE" --skip-bad-rows "$SKIP_BAD_ROWS"
  done
  train_tsv=$OUT/features/train.tsv valid_tsv=$OUT/features/valid.tsv
fi

# --- Training -------------------------------------------------------------------------------------------------------

# train FOLDER TRAIN_TSV ARCH UPDATES LR CRITERION OPTION...: trains a model and writes the numbers of fairseq's log to
# FOLDER/train.jsonl. A stopped training resumes from its last checkpoint and repeats at most a fifth of the updates. On
# CPU fairseq is started once for each process that shares the batch.
train() {
  local folder=$1 tsv=$2 arch=$3 updates=$4 lr=$5 rank
  shift 5
  mkdir -p "$folder"
  local -a length average=() mixed=() workers=()
  if [[ -n ${EPOCHS:-} ]]; then
    length=(--max-epoch "$EPOCHS" --save-interval 1 --no-epoch-checkpoints --save-interval-updates 2000
      --validate-interval 1 --log-interval 50)
  else
    local every=$((updates / 5 + 1))
    length=(--max-update "$updates" --save-interval 1000000 --save-interval-updates "$every"
      --validate-interval 1000000 --validate-interval-updates "$every" --log-interval $((updates / 40 + 1)))
  fi
  [[ -z ${EMA_DECAY:-} ]] || average=(--store-ema --ema-decay "$EMA_DECAY")
  ((!AMP)) || mixed=(--amp)
  ((!nano)) || workers=(--num-workers 0)
  local -a command=(fairseq-train "$tsv,$valid_tsv" "${options[@]}" --arch "$arch" --criterion "$@"
    --batch-size $((BATCH / PROCESSES)) --update-freq "$UPDATE_FREQ"
    --optimizer fused_adam --adam-betas "(0.9, $ADAM_BETA2)" --adam-eps 1e-8 --weight-decay 0.01 --clip-norm 1.0
    --lr-scheduler polynomial_decay_ratio --lr "$lr" --warmup-ratio "$WARMUP_RATIO" "${length[@]}" "${average[@]}"
    "${mixed[@]}" "${workers[@]}" --save-dir "$folder" --keep-interval-updates 1 --log-format json)
  if ((PROCESSES > 1)); then
    rm -f "$folder/rendezvous"
    command+=(--cpu --distributed-backend gloo --ddp-backend legacy_ddp --distributed-no-spawn
      --distributed-world-size "$PROCESSES" --distributed-init-method "file://$folder/rendezvous")
    export GLOO_SOCKET_IFNAME=lo
    for ((rank = 1; rank < PROCESSES; rank++)); do
      "${command[@]}" --distributed-rank "$rank" >"$folder/train.$rank.log" 2>&1 &
    done
    command+=(--distributed-rank 0)
  fi
  "${command[@]}" 2>&1 | tee -a "$folder/train.log" | show_training || die_of "$folder"/train*.log
  wait
  rm -f "$folder"/checkpoint_[0-9]*.pt "$folder"/checkpoint_best.pt "$folder"/train.[0-9]*.log "$folder/rendezvous"
  if [[ -n ${EMA_DECAY:-} ]]; then
    narvl convert "$folder/checkpoint_last.pt" "$folder/averaged.pt" --ema
    mv "$folder/averaged.pt" "$folder/checkpoint_last.pt"
  fi
  sed -n 's/^[^{]* | INFO | [a-z_.]* | {"/{"/p' "$folder/train.log" >"$folder/train.jsonl.part"
  mv "$folder/train.jsonl.part" "$folder/train.jsonl"
}

if [[ -n ${TEACHER:-} ]]; then
  mkdir -p "$OUT/teacher"
  ln -sfn "$TEACHER" "$OUT/teacher/checkpoint_last.pt"
else
  init=()
  [[ -z ${INIT:-} ]] || init=(--finetune-from-model "$INIT")
  stage teacher "$OUT/teacher/train.jsonl" train "$OUT/teacher" "$train_tsv" "$teacher_arch" "${TEACHER_UPDATES:-0}" \
    "$TEACHER_LR" "${teacher_loss[@]}" --label-smoothing "$LABEL_SMOOTHING" --dropout "$DROPOUT" "${init[@]}"
fi

# --- Outputs of the teacher: on the test file in all ways at once, and on the training file for distillation ----------

# generate NAME MODEL OPTION...: writes the outputs of a model's last checkpoint on the test file.
generate() {
  local name=$1 model=$2 part=$OUT/generate.part/$1
  shift 2
  mkdir -p "$part" "$OUT/generate/$name"
  fairseq-generate "$test_tsv" "${options[@]}" --path "$OUT/$model/checkpoint_last.pt" --gen-subset test \
    --batch-size "$answered" --scoring "$scoring" --results-path "$part" --no-progress-bar "$@" >"$part/log" 2>&1 ||
    die_of "$part/log"
  tail -n 1 "$part/generate-test.txt"
  mv "$part/generate-test.txt" "$OUT/generate/$name/generate-test.txt"
}

teacher_words=()
for teacher in "${teachers[@]}"; do
  # shellcheck disable=SC2086 # options are words
  beside stage "generate ${teacher%%=*}" "$OUT/generate/${teacher%%=*}/generate-test.txt" \
    generate "${teacher%%=*}" teacher ${teacher#*=}
  teacher_words+=($!)
done
if ((DISTIL || BASELINES)); then
  stage distil "$OUT/distilled/train.tsv" narvl distill --teacher "$OUT/teacher/checkpoint_last.pt" \
    --data "$train_tsv" --out "$OUT/distilled/train.tsv" --batch-size "$answered" \
    --bpe-dir "$vocab" --skip-bad-rows "$SKIP_BAD_ROWS" "${distil_options[@]}"
fi
for job in "${teacher_words[@]}"; do wait "$job"; done

# --- Students -------------------------------------------------------------------------------------------------------

# train_student FOLDER TRAIN_TSV CRITERION OPTION...: trains a student from the teacher's weights.
train_student() {
  local folder=$1 tsv=$2
  shift 2
  train "$folder" "$tsv" "$ARCH" "${STUDENT_UPDATES:-0}" "$STUDENT_LR" "$@" --num-queries "$QUERIES" --dropout "$STUDENT_DROPOUT" \
    --finetune-from-model "$OUT/teacher/checkpoint_last.pt" "${student_options[@]}"
}

qctc=(qctc --bigram-weight "$BIGRAM_WEIGHT" --score-weight "$SCORE_WEIGHT")
students=(student)
words=("$train_tsv" "$OUT/distilled/train.tsv") others=(student_distilled student_nodistill)
stage student "$OUT/student/train.jsonl" train_student "$OUT/student" "${words[DISTIL]}" "${qctc[@]}"
if ((BASELINES)); then
  other=${others[DISTIL]}
  students+=("$other" student_ce)
  stage "$other" "$OUT/$other/train.jsonl" train_student "$OUT/$other" "${words[1 - DISTIL]}" "${qctc[@]}"
  stage student_ce "$OUT/student_ce/train.jsonl" \
    train_student "$OUT/student_ce" "${words[DISTIL]}" query_cross_entropy
fi

# --- Results --------------------------------------------------------------------------------------------------------

export OMP_NUM_THREADS=$cores # for a single program
stage calibrate "$OUT/calibration.json" narvl calibrate "$OUT/student/checkpoint_last.pt" "$valid_tsv" \
  --test "$test_tsv" --teacher "$OUT/teacher/checkpoint_last.pt" --out "$OUT/calibration.json" --batch-size "$answered" \
  --bpe-dir "$vocab" "${latency_options[@]}"

for student in "${students[@]}"; do
  stage "generate $student" "$OUT/generate/$student/generate-test.txt" generate "$student" "$student" \
    "${student_words[@]}"
done

export OMP_NUM_THREADS=$THREADS
stage latency "$OUT/latency.json" narvl bench latency --teacher "$OUT/teacher/checkpoint_last.pt" \
  --student "$OUT/student/checkpoint_last.pt" --data "$test_tsv" --out "$OUT/latency.json" --images "$TIMED" \
  --bpe-dir "$vocab" "${latency_options[@]}"

# A report that is older than its inputs is written again.
[[ -z $(find "$OUT/generate" "$OUT/latency.json" "$OUT/calibration.json" -type f -newer "$OUT/report.html" 2>/dev/null) ]] ||
  rm -f "$OUT/report.html"
stage report "$OUT/report.html" narvl report "$OUT" --data "$test_tsv" --task "$task" --bpe-dir "$vocab" \
  "${report_options[@]}"
rm -rf "$OUT/generate.part"
echo "Table: $OUT/table.md · page: $OUT/report.html · time of each stage: $OUT/stages.tsv"
