#!/usr/bin/env bash
# Captioning from nothing to a report: scenes -> teacher -> distilled captions -> student -> generation -> scores.
#
#   bash run_scripts/caption.sh [KEY=value ...]
#
#   PRESET     smoke, quick or full: the sizes below (quick)
#   OUT        folder of the run (runs/caption_PRESET_seedSEED); a stage whose output is there is skipped
#   SEED       of the scenes and of training (1)
#   ARCH       student; its teacher is ofa_ of the same size (narvl_nano)
#   DATA       folder with {train,valid,test}.tsv in OFA's columns, or with OFA's own names, in place of scenes
#   TEACHER    checkpoint of a trained teacher, in place of training one
#   BPE        folder of the vocabulary (dict.txt of a published teacher, or spm.model), in place of learning one
#   BASELINES  1: also train a student without distillation, and one with cross entropy (0)
#   PROCESSES  processes that share a batch in training on CPU (2, or 1 on a single core or with a GPU)
#   THREADS    torch's threads in each (1)
#
# and, each with a default by preset, what the tables below list: sizes of the data, updates, learning rates.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run_scripts/common.sh"
[[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # what runs beside
command -v narvl >/dev/null || die "narvl is not installed; run: make setup"

KEPT_KEYS="PRESET SEED ARCH DATA TEACHER BPE TRAIN VALID TEST NOUNS OBJECTS VOCAB_SIZE PATCH_IMAGE_SIZE
 TEACHER_UPDATES TEACHER_LR LABEL_SMOOTHING STUDENT_UPDATES STUDENT_LR BIGRAM_WEIGHT BATCH UPDATE_FREQ DROPOUT
 WARMUP_PERCENT ADAM_BETA2 MATMUL_PRECISION QUERIES BEAM NBEST MAX_LEN NO_REPEAT_NGRAM WORDS NUM_BINS SKIP_BAD_ROWS TIMED"
KEPT_KEYS=${KEPT_KEYS//$'\n'/}
read_settings "$KEPT_KEYS OUT BASELINES PROCESSES THREADS WORKERS" "$@"

# --- Settings -------------------------------------------------------------------------------------------------------

defaults PRESET=quick SEED=1 ARCH=narvl_nano BASELINES=0 THREADS=1 WORKERS=1
if (($(nproc) == 1)) || command -v nvidia-smi >/dev/null; then
  defaults PROCESSES=1
else
  defaults PROCESSES=2
fi
[[ $ARCH == narvl_?* ]] || die "ARCH=$ARCH: give a student's architecture, such as narvl_nano or narvl_base"
[[ $ARCH == *_nano ]] && nano=1 || nano=0
teacher_arch=ofa_${ARCH#narvl_}

if ((!nano)); then
  # The recipe of the published models, for one GPU: 5 epochs of COCO's 566,747 captions, 128 at a time.
  [[ -n ${BPE:-} ]] || die "ARCH=$ARCH: give BPE=FOLDER with the dict.txt of the published checkpoints"
  defaults PATCH_IMAGE_SIZE=480 BATCH=16 UPDATE_FREQ=8 DROPOUT=0.1 LABEL_SMOOTHING=0.1 QUERIES=30 WORDS=20 MAX_LEN=16 \
    TEACHER_UPDATES=22140 TEACHER_LR=1e-5 STUDENT_UPDATES=22140 STUDENT_LR=1e-5 ADAM_BETA2=0.999 NO_REPEAT_NGRAM=3 \
    NUM_BINS=1000 MATMUL_PRECISION=highest BIGRAM_WEIGHT=0
fi

case $PRESET in
  smoke) # is everything in place? Nobody learns anything.
    defaults TRAIN=32 VALID=8 TEST=8 NOUNS=8 OBJECTS=1 PATCH_IMAGE_SIZE=64 VOCAB_SIZE=200 \
      BATCH=16 TEACHER_UPDATES=4 TEACHER_LR=1e-3 STUDENT_UPDATES=4 STUDENT_LR=1e-3 BEAM=5 TIMED=4 MAX_LEN=8
    ;;
  quick) # the demo
    defaults TRAIN=16000 VALID=200 TEST=1000 NOUNS=40 OBJECTS=2 PATCH_IMAGE_SIZE=128 VOCAB_SIZE=1000 \
      TEACHER_UPDATES=2200 STUDENT_UPDATES=3200 QUERIES=24 TIMED=100
    ;;
  full)
    defaults TRAIN=32000 VALID=400 TEST=1000 NOUNS=100 OBJECTS=4 PATCH_IMAGE_SIZE=128 VOCAB_SIZE=1000 \
      TEACHER_UPDATES=6000 STUDENT_UPDATES=10000 QUERIES=32 TIMED=100
    ;;
  *) die "PRESET=$PRESET: choose smoke, quick or full" ;;
esac
# A scene's caption has 20 words at most and the vocabulary holds them whole, so MAX_LEN tokens are enough for the
# teacher, and QUERIES for the student.
defaults BATCH=32 TEACHER_LR=2e-3 STUDENT_LR=2e-3 BIGRAM_WEIGHT=10 BEAM=5 NBEST=5 SKIP_BAD_ROWS=0 UPDATE_FREQ=1 DROPOUT=0.1 \
  LABEL_SMOOTHING=0 ADAM_BETA2=0.98 MATMUL_PRECISION=medium WARMUP_PERCENT=6 QUERIES=24 WORDS=20 MAX_LEN=22 NO_REPEAT_NGRAM=0 NUM_BINS=0 \
  OUT="runs/caption_${PRESET}_seed$SEED"

((BATCH % PROCESSES == 0)) || die "BATCH=$BATCH: is not divisible by PROCESSES=$PROCESSES, which share each batch"
for key in DATA BPE TEACHER; do # a run must not depend on the folder it is started from
  [[ -z ${!key:-} ]] || [[ -e ${!key} ]] || die "$key=${!key}: no such file or folder"
  [[ -z ${!key:-} ]] || printf -v "$key" '%s' "$(realpath "${!key}")"
done
[[ -z ${TEACHER:-} || -n ${BPE:-} ]] || die "TEACHER=$TEACHER: give the vocabulary it was trained with, too: BPE=FOLDER"

# find_split NAME...: prints the first of these files that DATA holds.
find_split() {
  local name
  for name in "$@"; do
    if [[ -e $DATA/$name.tsv ]]; then
      echo "$DATA/$name.tsv"
      return
    fi
  done
  die "DATA=$DATA: holds none of $*, each with .tsv"
}

OUT=$(realpath -m "$OUT")
if [[ -n ${DATA:-} ]]; then
  train_tsv=$(find_split train caption_train caption_stage1_train)
  valid_tsv=$(find_split valid val caption_valid caption_val)
  test_tsv=$(find_split test caption_test)
else
  train_tsv=$OUT/data/caption/train.tsv valid_tsv=$OUT/data/caption/valid.tsv test_tsv=$OUT/data/caption/test.tsv
fi

mkdir -p "$OUT"
keep_settings "$KEPT_KEYS" "$OUT/settings.txt"
# Threads that wait sleep: on a busy machine those that spin make two threads many times slower than one.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$THREADS PYTHONWARNINGS=ignore::FutureWarning
user_dir=$(narvl path)

# --- Data -----------------------------------------------------------------------------------------------------------

if [[ -z ${DATA:-} ]]; then
  stage scenes "$test_tsv" narvl data scenes --out "$OUT/data" --seed "$SEED" --size "$PATCH_IMAGE_SIZE" \
    --train "$TRAIN" --valid "$VALID" --test "$TEST" --nouns "$NOUNS" --max-objects "$OBJECTS"
fi

vocab=${BPE:-$OUT/vocab}
if [[ -z ${BPE:-} ]]; then
  stage vocab "$vocab/spm.model" narvl vocab "$train_tsv" --out "$vocab" --vocab-size "$VOCAB_SIZE"
fi

# The trunk of nano is frozen: its features are computed once, and training reads them instead of pictures.
if ((nano)); then
  for split in train valid; do
    pictures=${split}_tsv
    stage "features $split" "$OUT/features/$split.tsv" \
      narvl features "${!pictures}" "$OUT/features/$split.tsv" --arch "$ARCH" \
      --patch-image-size "$PATCH_IMAGE_SIZE" --skip-bad-rows "$SKIP_BAD_ROWS"
  done
  train_tsv=$OUT/features/train.tsv valid_tsv=$OUT/features/valid.tsv
fi

# --- Training -------------------------------------------------------------------------------------------------------

task=(--user-dir "$user_dir" --task caption --bpe-dir "$vocab" --selected-cols 0,4,2 --max-tgt-length "$WORDS"
  --patch-image-size "$PATCH_IMAGE_SIZE" --num-bins "$NUM_BINS" --seed "$SEED" --num-workers "$WORKERS"
  --skip-bad-rows "$SKIP_BAD_ROWS")

# train FOLDER TRAIN_TSV ARCH UPDATES LR CRITERION OPTION...: trains until FOLDER/train.jsonl, the numbers of
# fairseq's log, is there. A training that was stopped goes on at its last checkpoint, a tenth of the updates back at
# most. On CPU fairseq is started once for each process that shares the batch.
train() {
  local folder=$1 tsv=$2 arch=$3 updates=$4 lr=$5 criterion=$6 rank
  shift 6
  mkdir -p "$folder"
  local -a command=(fairseq-train "$tsv,$valid_tsv" "${task[@]}" --arch "$arch" --criterion "$criterion" "$@"
    --dropout "$DROPOUT" --matmul-precision "$MATMUL_PRECISION"
    --batch-size $((BATCH / PROCESSES)) --update-freq "$UPDATE_FREQ"
    --optimizer adam --adam-betas "(0.9, $ADAM_BETA2)" --adam-eps 1e-8 --weight-decay 0.01 --clip-norm 1.0
    --lr-scheduler polynomial_decay --lr "$lr" --warmup-updates $((updates * WARMUP_PERCENT / 100))
    --total-num-update "$updates" --max-update "$updates"
    --save-dir "$folder" --save-interval 1000000 --save-interval-updates $((updates / 10 + 1))
    --keep-interval-updates 1 --validate-interval 1000000 --validate-interval-updates $((updates / 10 + 1))
    --log-format json --log-interval $((updates / 40 + 1)))
  if ((PROCESSES > 1)); then
    rm -f "$folder/rendezvous"
    command+=(--cpu --distributed-backend gloo --ddp-backend legacy_ddp --distributed-no-spawn
      --load-checkpoint-on-all-dp-ranks
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
  sed -n 's/^[^{]* | INFO | [a-z_.]* | {"/{"/p' "$folder/train.log" >"$folder/train.jsonl.part"
  mv "$folder/train.jsonl.part" "$folder/train.jsonl"
}

if [[ -n ${TEACHER:-} ]]; then
  mkdir -p "$OUT/teacher"
  ln -sfn "$TEACHER" "$OUT/teacher/checkpoint_last.pt"
else
  stage teacher "$OUT/teacher/train.jsonl" train "$OUT/teacher" "$train_tsv" "$teacher_arch" "$TEACHER_UPDATES" \
    "$TEACHER_LR" label_smoothed_cross_entropy --label-smoothing "$LABEL_SMOOTHING"
fi

# --- The teacher's captions: of the test pictures, and on another core of the training pictures, to learn from ------

# generate NAME MODEL OPTION...: captions the test pictures with the last checkpoint of a model.
generate() {
  local name=$1 model=$2 part=$OUT/generate.part/$1
  shift 2
  mkdir -p "$part" "$OUT/generate/$name"
  fairseq-generate "$test_tsv" "${task[@]}" --path "$OUT/$model/checkpoint_last.pt" --gen-subset test \
    --batch-size "$BATCH" --scoring coco_caption --results-path "$part" --no-progress-bar "$@" >"$part/log" 2>&1 ||
    die_of "$part/log"
  tail -n 1 "$part/generate-test.txt"
  mv "$part/generate-test.txt" "$OUT/generate/$name/generate-test.txt"
}

decoding=(--max-len-b "$MAX_LEN" --no-repeat-ngram-size "$NO_REPEAT_NGRAM")
{
  stage "generate teacher_beam5" "$OUT/generate/teacher_beam5/generate-test.txt" \
    generate teacher_beam5 teacher --beam 5 "${decoding[@]}"
  stage "generate teacher_greedy" "$OUT/generate/teacher_greedy/generate-test.txt" \
    generate teacher_greedy teacher --beam 1 "${decoding[@]}"
} &
teacher_captions=$!
stage distil "$OUT/distilled/train.tsv" narvl distill --teacher "$OUT/teacher/checkpoint_last.pt" \
  --data "$train_tsv" --out "$OUT/distilled/train.tsv" --beam "$BEAM" --nbest "$NBEST" --batch-size "$BATCH" \
  --bpe-dir "$vocab" --skip-bad-rows "$SKIP_BAD_ROWS" "${decoding[@]}"
wait "$teacher_captions"

# --- Students -------------------------------------------------------------------------------------------------------

# train_student FOLDER TRAIN_TSV CRITERION OPTION...: from the teacher's weights. Of the NBEST captions that the teacher
# gave it may say any: queries that choose at the same time otherwise mix the wordings of several good captions.
train_student() {
  local folder=$1 tsv=$2 criterion=$3
  shift 3
  train "$folder" "$tsv" "$ARCH" "$STUDENT_UPDATES" "$STUDENT_LR" "$criterion" --num-queries "$QUERIES" \
    --any-reference --finetune-from-model "$OUT/teacher/checkpoint_last.pt" "$@"
}

qctc=(qctc --bigram-weight "$BIGRAM_WEIGHT")
students=(student)
stage student "$OUT/student/train.jsonl" train_student "$OUT/student" "$OUT/distilled/train.tsv" "${qctc[@]}"
if ((BASELINES)); then
  students+=(student_nodistill student_ce)
  stage student_nodistill "$OUT/student_nodistill/train.jsonl" \
    train_student "$OUT/student_nodistill" "$train_tsv" "${qctc[@]}"
  stage student_ce "$OUT/student_ce/train.jsonl" \
    train_student "$OUT/student_ce" "$OUT/distilled/train.tsv" query_cross_entropy
fi

# --- Results --------------------------------------------------------------------------------------------------------

for student in "${students[@]}"; do
  stage "generate $student" "$OUT/generate/$student/generate-test.txt" generate "$student" "$student"
done

stage latency "$OUT/latency.json" narvl bench latency --teacher "$OUT/teacher/checkpoint_last.pt" \
  --student "$OUT/student/checkpoint_last.pt" --data "$test_tsv" --out "$OUT/latency.json" --images "$TIMED" \
  --bpe-dir "$vocab" "${decoding[@]}"

# A report that is older than what it reports on is made anew.
[[ -z $(find "$OUT/generate" "$OUT/latency.json" -type f -newer "$OUT/report.html" 2>/dev/null) ]] ||
  rm -f "$OUT/report.html"
stage report "$OUT/report.html" narvl report "$OUT" --data "$test_tsv" --bpe-dir "$vocab"
rm -rf "$OUT/generate.part"
echo "Table: $OUT/table.md · page: $OUT/report.html · time of each stage: $OUT/stages.tsv"
