#!/usr/bin/env bash
# Fine-tune a block-pruned model with every zero kept, on one GPU, several, or several machines: finetune_dense.py, under
# torchrun where there are several. Flags, GPUs and their memory are checked before anything is loaded. See --help.
set -euo pipefail # for bash 3.2 too, which macOS has: no associative arrays, no mapfile, and "${X[@]}" of an empty array fails

# -------------------------------------------------------------------------------------------------------- configuration

NUM_EPOCHS=3
LEARNING_RATE=5e-5
BATCH_SIZE=1 # windows that a device takes at once
BLOCK_SIZE=1024
MAX_TRAIN_SAMPLES=30000
DATASET=wikitext2
EFFECTIVE_BATCH_SIZE=8 # windows an optimizer step, over all devices and accumulated forwards
GPU_PRECISION=bf16     # of weights, gradients and optimizer states: so 7B needs 53 GiB, in bf16-mixed more than twice that
DEFAULT_GPU=2
PRUNED_MODEL=out/llama2_7b/block_16x16_20sparsity/wanda/pruned_model
OUTPUT_DIR=""    # dense_finetuned_model or lora_finetuned_model beside the pruned model
SAVE_SECONDS=900 # that torchrun gives its processes to save their state; its own 30 are too few for 50 GB

FAST_MODEL=out/tiny_llama/block_16x16_20sparsity/kfac/pruned_model # --fast: of the tiny LM, made where it is missing
FAST_PRUNING=(main_block.py --fast --prune_method kfac --sparsity_type block --block_size 16 --sparsity_ratio 0.2
    --save "$FAST_MODEL")

# -------------------------------------------------------------------------------------------------------------- helpers

SCRIPT=run_dense_finetune_block_20sparsity.sh
RULE="=========================================="

usage() {
    cat <<EOF
Usage: $SCRIPT [OPTIONS] [-- FLAGS OF finetune_dense.py]

Options:
  --num_gpus N        Number of GPUs to use (default: 1)
  --gpu_ids "X,Y"     Comma-separated GPU IDs (default: "$DEFAULT_GPU", or the first one if there is no such GPU)
  --model DIR         Pruned model (default: $PRUNED_MODEL)
  --output_dir DIR    Directory of the trained model (default: dense_finetuned_model beside the pruned model)
  --method METHOD     full, or lora (default: full)
  --fast              Try it on the tiny LM, which is pruned first; on the CPU where there is no GPU
  --device cpu        Train on the CPU; --num_gpus is the number of processes then
  --nnodes N          Number of machines (default: 1). Run the same command on each, with its own --node_rank
  --node_rank R       Number of this machine, from 0
  --rdzv_endpoint H:P Address of machine 0, and a port that is free there
  --yes               Go on where GPU memory may be insufficient, without asking
  --dry_run           Show configuration, memory and command, and start nothing
  -h, --help          Show this help message

Gradient accumulation follows from the number of GPUs: the effective batch size stays $EFFECTIVE_BATCH_SIZE.
Ctrl+C saves the last state; the same command goes on from there.

Examples:
  Single GPU (default):     ./$SCRIPT
  Single GPU (GPU 3):       ./$SCRIPT --num_gpus 1 --gpu_ids "3"
  Dual GPU (GPU 2,3):       ./$SCRIPT --num_gpus 2 --gpu_ids "2,3"
  Quad GPU (GPU 0-3):       ./$SCRIPT --num_gpus 4 --gpu_ids "0,1,2,3"
  Sharded over four:        ./$SCRIPT --num_gpus 4 -- --fsdp
  LoRA:                     ./$SCRIPT --method lora

Performance:
  Memory: --dry_run prints the estimate for this model and these GPUs
  Time:   measure a hundredth of it: --output_dir out/trial -- --max_train_samples 300
EOF
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# A word of the command line as FLAG and NAME: --num-gpus=2 is --num-gpus and num_gpus.
split() {
    WORD=$1 FLAG=${1%%=*}
    NAME=${FLAG#--}
    NAME=${NAME//-/_}
}

# Give the variable of the flag's name its value: what is behind the "=", or the next word, and then USED is 1.
take_value() {
    local value=""
    USED=0
    if [ "$WORD" != "$FLAG" ]; then
        value=${WORD#*=}
    elif [ $# -gt 0 ] && [[ $1 != --* ]]; then
        value=$1 USED=1
    fi
    [ -n "$value" ] || fail "$FLAG: expected a value. See: bash $SCRIPT --help"
    printf -v "$(tr '[:lower:]' '[:upper:]' <<<"$NAME")" '%s' "$value"
}

check_count() {
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1 $2: expected a number of 1 or more"
}

# Whether the first argument is among the others.
among() {
    local wanted=$1 one
    shift
    for one in "$@"; do
        [ "$one" != "$wanted" ] || return 0
    done
    return 1
}

joined() {
    local IFS=,
    printf '%s' "$*"
}

# A command as it can be typed.
shown() {
    local word line=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]] || word=$(printf '%q' "$word")
        line="$line $word"
    done
    printf '%s' "${line# }"
}

CHILD="" PENDING="" INTERRUPTED=""

hand_on() {
    INTERRUPTED=1 HANDED=1
    if [ -z "$CHILD" ]; then
        PENDING=$1
    else
        kill -s "$1" "$CHILD" 2>/dev/null || true
    fi
}

# Run a command and wait for its end; its exit status is STATUS. It has a process group of its own, so that Ctrl+C reaches this
# script alone, and each signal is handed on once: to the command, which tells the processes that it started. In this script's
# group it would get Ctrl+C from the terminal as well, and `kill` of this script would be no different from that.
run() {
    local waited
    CHILD="" PENDING="" INTERRUPTED="" STATUS=127
    trap 'hand_on INT' INT
    trap 'hand_on TERM' TERM HUP # a closed terminal: save the state
    trap 'hand_on QUIT' QUIT
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    [ -z "$PENDING" ] || kill -s "$PENDING" "$CHILD" 2>/dev/null || true
    while
        HANDED="" waited=0
        wait "$CHILD" || waited=$?
        [ "$waited" = 127 ] || STATUS=$waited # 127: it was waited for before
        [ -n "$HANDED" ]                      # a signal ends `wait`, and not the command
    do :; done
    trap - INT TERM HUP QUIT
    [ "$STATUS" -le 128 ] || INTERRUPTED=1
}

# ---------------------------------------------------------------------------------------------------------------- flags

MODEL="" NUM_GPUS="" GPU_IDS="" METHOD=full DEVICE=auto NNODES=1 NODE_RANK="" RDZV_ENDPOINT="" YES="" DRY_RUN="" FAST=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ "$1" != -h ] || set -- --help
    [[ $1 == --* ]] || fail "$1: expected a flag. See: bash $SCRIPT --help"
    split "$1"
    shift
    case $NAME in
        help | yes | dry_run | fast)
            [ "$WORD" = "$FLAG" ] || fail "$FLAG: takes no value"
            [ "$NAME" != yes ] || YES=1
            [ "$NAME" != dry_run ] || DRY_RUN=1
            [ "$NAME" != fast ] || FAST=1
            if [ "$NAME" = help ]; then
                usage
                exit 0
            fi
            ;;
        num_gpus | gpu_ids | model | output_dir | method | nnodes | node_rank | rdzv_endpoint | device)
            take_value "$@"
            shift "$USED"
            ;;
        *) fail "$FLAG: unknown flag; those of finetune_dense.py go behind a --. See: bash $SCRIPT --help" ;;
    esac
done
[ $# -eq 0 ] || shift

if [ -n "$FAST" ]; then # finetune_dense.py's own preset decides
    NUM_EPOCHS="" LEARNING_RATE="" BATCH_SIZE="" BLOCK_SIZE="" MAX_TRAIN_SAMPLES="" DATASET="" EFFECTIVE_BATCH_SIZE=""
    GPU_PRECISION="" PRUNED_MODEL=$FAST_MODEL
fi

GRADIENT_ACCUMULATION_STEPS="" PRECISION="" DATA_DIR="" HANDED_ON=()
while [ $# -gt 0 ]; do # what the banner shows and what is computed with is taken from there, the rest is handed on as it is
    split "$1"
    shift
    [[ $WORD == --* ]] || NAME=""
    case $NAME in
        num_epochs | learning_rate | batch_size | block_size | max_train_samples | dataset | precision | data_dir | \
            effective_batch_size | gradient_accumulation_steps)
            take_value "$@"
            shift "$USED"
            ;;
        help | model | method | device | fast | dry_run) fail "$FLAG: is a flag of this script too, give it before the --" ;;
        save) fail "$FLAG: give --output_dir before the --" ;;
        gpu_memory | num_processes) fail "$FLAG: is found out by this script, leave it out" ;;
        *) HANDED_ON+=("$WORD") ;;
    esac
done

case $METHOD in full | lora) ;; *) fail "--method $METHOD: expected full or lora" ;; esac
case $DEVICE in auto | cpu | cuda) ;; *) fail "--device $DEVICE: expected auto, cpu or cuda" ;; esac
[ -z "$NUM_GPUS" ] || check_count --num_gpus "$NUM_GPUS"
GPU_IDS=${GPU_IDS// /}
[[ -z $GPU_IDS || $GPU_IDS =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpu_ids $GPU_IDS: expected numbers with commas between them, as 2,3"
check_count --nnodes "$NNODES"
if [ "$NNODES" -gt 1 ]; then
    [[ $RDZV_ENDPOINT =~ .:[0-9]+$ ]] || fail "--nnodes $NNODES: needs --rdzv_endpoint HOST:PORT, the address of machine 0"
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,5})$ && $NODE_RANK -lt $NNODES ]] ||
        fail "--nnodes $NNODES: needs --node_rank, the number of this machine from 0 to $((NNODES - 1))"
elif [ "${NODE_RANK:-0}" != 0 ] || [ -n "$RDZV_ENDPOINT" ]; then
    fail "--node_rank and --rdzv_endpoint: are of several machines; give --nnodes 2 or more"
fi

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    command -v python >/dev/null || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "$PYTHON: not found. Activate the environment, or name an interpreter by PYTHON=..."

# ----------------------------------------------------------------------------------------------------------------- GPUs

IDS=() TOTAL=() FREE=() # of the GPUs that are there, in MiB; 0 where nvidia-smi does not tell
NO_GPU="there is no nvidia-smi"
if [ "$DEVICE" != cpu ] && command -v nvidia-smi >/dev/null; then
    NO_GPU="nvidia-smi lists none"
    LISTED=$(nvidia-smi --query-gpu=index,memory.total,memory.free --format=csv,noheader,nounits 2>/dev/null) ||
        LISTED="" NO_GPU="nvidia-smi fails"
    while IFS=', ' read -r id total free; do
        [[ $id =~ ^[0-9]+$ ]] || continue
        [[ $total =~ ^[0-9]+$ ]] || total=0
        [[ $free =~ ^[0-9]+$ ]] || free=$total
        IDS+=("$id") TOTAL+=("$total") FREE+=("$free")
    done <<<"$LISTED"
fi

CHOSEN=()
if [ ${#IDS[@]} -eq 0 ]; then
    [ "$DEVICE" = cpu ] || [ "$FAST$DEVICE" = 1auto ] ||
        fail "no NVIDIA GPU: $NO_GPU. For a trial on the CPU: --fast; to train this model on it: --device cpu"
    [ -z "$GPU_IDS" ] || fail "--gpu_ids $GPU_IDS: training is on the CPU. Leave it out"
    DEVICE=cpu NUM_GPUS=${NUM_GPUS:-1}
elif [ -n "$GPU_IDS" ]; then
    DEVICE=cuda
    IFS=, read -r -a CHOSEN <<<"$GPU_IDS"
    for ((i = 0; i < ${#CHOSEN[@]}; i++)); do
        among "${CHOSEN[i]}" "${IDS[@]}" || fail "--gpu_ids $GPU_IDS: no GPU ${CHOSEN[i]}; there are $(joined "${IDS[@]}")"
        ! among "${CHOSEN[i]}" "${CHOSEN[@]:0:i}" || fail "--gpu_ids $GPU_IDS: GPU ${CHOSEN[i]} is named twice"
    done
    [ "${NUM_GPUS:-${#CHOSEN[@]}}" = ${#CHOSEN[@]} ] || fail "--num_gpus $NUM_GPUS: --gpu_ids $GPU_IDS are ${#CHOSEN[@]}"
else
    DEVICE=cuda
    VISIBLE=()
    for id in "${IDS[@]}"; do # all, or those that a scheduler gave
        if [[ ! ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ || ,$CUDA_VISIBLE_DEVICES, == *,$id,* ]]; then
            VISIBLE+=("$id")
        fi
    done
    [ ${#VISIBLE[@]} -gt 0 ] || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: no such GPU; there are $(joined "${IDS[@]}")"
    [ "${NUM_GPUS:-1}" -le ${#VISIBLE[@]} ] ||
        fail "--num_gpus $NUM_GPUS: there are ${#VISIBLE[@]} GPUs ($(joined "${VISIBLE[@]}"))"
    CHOSEN=("${VISIBLE[@]:0:${NUM_GPUS:-1}}")
    if [ -z "$NUM_GPUS" ] && among "$DEFAULT_GPU" "${VISIBLE[@]}"; then
        CHOSEN=("$DEFAULT_GPU")
    elif [ -z "$NUM_GPUS" ]; then
        echo "There is no GPU $DEFAULT_GPU, the default: using GPU ${CHOSEN[0]}"
    fi
fi
if [ "$DEVICE" = cuda ]; then
    NUM_GPUS=${#CHOSEN[@]} PRECISION=${PRECISION:-$GPU_PRECISION}
    GPU_IDS=$(joined "${CHOSEN[@]}")
fi
export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$GPU_IDS # nvidia-smi's order; CUDA's own is another

# -------------------------------------------------------------------------------------------------- batch and directories

N_PROCESSES=$((NUM_GPUS * NNODES))
[ -z "$BATCH_SIZE" ] || check_count --batch_size "$BATCH_SIZE"
[ -z "$EFFECTIVE_BATCH_SIZE" ] || check_count --effective_batch_size "$EFFECTIVE_BATCH_SIZE"
if [ -n "$GRADIENT_ACCUMULATION_STEPS" ]; then
    check_count --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"
    EFFECTIVE_BATCH_SIZE=${BATCH_SIZE:+$((${BATCH_SIZE:-0} * N_PROCESSES * GRADIENT_ACCUMULATION_STEPS))}
elif [ -n "$BATCH_SIZE" ] && [ -n "$EFFECTIVE_BATCH_SIZE" ]; then
    GRADIENT_ACCUMULATION_STEPS=$((EFFECTIVE_BATCH_SIZE / (BATCH_SIZE * N_PROCESSES)))
    if [ $((GRADIENT_ACCUMULATION_STEPS * BATCH_SIZE * N_PROCESSES)) -ne "$EFFECTIVE_BATCH_SIZE" ]; then
        COUNTS=()
        for ((n = 1; n <= EFFECTIVE_BATCH_SIZE; n++)); do
            [ $((EFFECTIVE_BATCH_SIZE % (BATCH_SIZE * NNODES * n))) -ne 0 ] || COUNTS+=("$n")
        done
        [ ${#COUNTS[@]} -gt 0 ] || COUNTS=(none)
        fail "--num_gpus $NUM_GPUS: a batch of $BATCH_SIZE x $NUM_GPUS x $NNODES machines does not divide the effective batch size\
 $EFFECTIVE_BATCH_SIZE; these do: $(joined "${COUNTS[@]}")"
    fi
fi

PRUNED_MODEL=${MODEL:-$PRUNED_MODEL}
PRUNED_MODEL=${PRUNED_MODEL%/}
if [ -z "$OUTPUT_DIR" ]; then
    OUTPUT_DIR=dense_finetuned_model
    [ "$METHOD" = full ] || OUTPUT_DIR=lora_finetuned_model
    [[ $PRUNED_MODEL != */* ]] || OUTPUT_DIR=${PRUNED_MODEL%/*}/$OUTPUT_DIR
fi

HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/
[ "$HERE" != "$PWD/" ] || HERE="" # the scripts' names are enough

MAKE_MODEL=()
if [ ! -f "$PRUNED_MODEL/config.json" ]; then
    if [ -z "$FAST" ]; then
        DENSE=DENSE_MODEL
        [ -n "$MODEL" ] || DENSE=meta-llama/Llama-2-7b-hf
        fail "$PRUNED_MODEL: no pruned model there. Run: python main_block.py --model $DENSE --prune_method wanda\
 --sparsity_type block --block_size 16 --sparsity_ratio 0.2 --save $(shown "$PRUNED_MODEL")"
    fi
    [ -z "$MODEL" ] || fail "$PRUNED_MODEL: no pruned model there. Leave --model out, and --fast makes one"
    [ "$NNODES" -eq 1 ] || fail "$PRUNED_MODEL: no pruned model there. Run on one machine: python $(shown "${FAST_PRUNING[@]}")"
    MAKE_MODEL=("$PYTHON" "$HERE${FAST_PRUNING[0]}" "${FAST_PRUNING[@]:1}")
    [ -z "$DATA_DIR" ] || MAKE_MODEL+=(--data_dir "$DATA_DIR")
fi

# ---------------------------------------------------------------------------------------------------------- the command

TRAINING=("${HERE}finetune_dense.py" --model "$PRUNED_MODEL" --save "$OUTPUT_DIR" --method "$METHOD" --device "$DEVICE")
with() {
    [ -z "$2" ] || TRAINING+=("$1" "$2")
}
[ -z "$FAST" ] || TRAINING+=(--fast)
with --num_epochs "$NUM_EPOCHS"
with --learning_rate "$LEARNING_RATE"
with --batch_size "$BATCH_SIZE"
with --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"
[ -n "$GRADIENT_ACCUMULATION_STEPS" ] || with --effective_batch_size "$EFFECTIVE_BATCH_SIZE"
with --block_size "$BLOCK_SIZE"
with --max_train_samples "$MAX_TRAIN_SAMPLES"
with --dataset "$DATASET"
with --precision "$PRECISION"
with --data_dir "$DATA_DIR"
TRAINING+=(${HANDED_ON[@]+"${HANDED_ON[@]}"})

COMMAND=("$PYTHON")
if [ "$N_PROCESSES" -gt 1 ]; then
    COMMAND+=(-m torch.distributed.run --nproc_per_node "$NUM_GPUS" --shutdown_timeout "$SAVE_SECONDS")
    if [ "$NNODES" -gt 1 ]; then # static: machine 0 is rank 0, at the address that is given and not at its host's name
        COMMAND+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --rdzv_backend static --rdzv_endpoint "$RDZV_ENDPOINT"
            --rdzv_id dense_finetune)
    else
        COMMAND+=(--standalone)
    fi
fi
COMMAND+=("${TRAINING[@]}")
AS_TYPED="CUDA_DEVICE_ORDER=$CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES $(shown "${COMMAND[@]}")"

# ----------------------------------------------------------------------------------------------------------- the banner

PRESET="(fast preset)"
LABEL=Full KIND=dense
[ "$METHOD" = full ] || LABEL=LoRA KIND=LoRA
SHOWN_DATASET=${DATASET:-$PRESET}
[ "$DATASET" != wikitext2 ] || SHOWN_DATASET="wikitext (wikitext-2-raw-v1)"
if [ "$DEVICE" = cpu ]; then
    MODE="CPU" WHERE="$NUM_GPUS process(es) on the CPU" USING="one process on the CPU" SHOWN_GPUS="0 ($WHERE)"
    [ "$N_PROCESSES" -eq 1 ] || MODE="CPU (torchrun)" USING="torchrun on the CPU ($NUM_GPUS processes)"
else
    MODE="Single GPU" WHERE="$NUM_GPUS GPU(s) on device(s): $GPU_IDS" USING="single-GPU training" SHOWN_GPUS=$NUM_GPUS
    [ "$N_PROCESSES" -eq 1 ] || MODE="Multi-GPU (torchrun)" USING="multi-GPU training with torchrun ($NUM_GPUS GPUs)"
fi
MACHINES=""
[ "$NNODES" -eq 1 ] || MACHINES="
  Machines: $NNODES, this is number $NODE_RANK, rendezvous at $RDZV_ENDPOINT"

cat <<EOF
$RULE
Dense Fine-tuning Configuration
$RULE
Method: $LABEL fine-tuning with SparseTrainer
Pruned model: $PRUNED_MODEL
Output directory: $OUTPUT_DIR
Dataset: $SHOWN_DATASET

GPU Configuration:
  Number of GPUs: $SHOWN_GPUS
  GPU IDs: ${GPU_IDS:-none}
  Training mode: $MODE$MACHINES

Training Parameters:
  Number of epochs: ${NUM_EPOCHS:-$PRESET}
  Learning rate: ${LEARNING_RATE:-$PRESET}
  Per-device batch size: ${BATCH_SIZE:-$PRESET}
  Gradient accumulation: ${GRADIENT_ACCUMULATION_STEPS:-$PRESET}
  Effective batch size: ${EFFECTIVE_BATCH_SIZE:-$PRESET}
  Block size: ${BLOCK_SIZE:-$PRESET}
  Max train samples: ${MAX_TRAIN_SAMPLES:-$PRESET}
  Precision: ${PRECISION:-auto}
$RULE

EOF

# --------------------------------------------------------------------------------------------- the model and its memory

if [ ${#MAKE_MODEL[@]} -gt 0 ]; then
    printf 'There is no pruned model yet. It is made by:\n  %s\n\n' "$(shown "${MAKE_MODEL[@]}")"
    if [ -n "$DRY_RUN" ]; then
        printf 'The memory is estimated when it is there. The command is then:\n  %s\n' "$AS_TYPED"
        exit 0
    fi
    run "${MAKE_MODEL[@]}"
    if [ "$STATUS" -ne 0 ]; then
        [ -z "$INTERRUPTED" ] || echo "Interrupted. The same command goes on from there." >&2
        exit "$STATUS"
    fi
fi

CHECK=("$PYTHON" "${TRAINING[@]}" --dry_run --num_processes "$N_PROCESSES")
if [ "$DEVICE" = cuda ]; then
    LEAST="" # the place in the lists of the chosen GPU with the least free memory
    for ((i = 0; i < ${#IDS[@]}; i++)); do
        if among "${IDS[i]}" "${CHOSEN[@]}" && { [ -z "$LEAST" ] || [ "${FREE[i]}" -lt "${FREE[LEAST]}" ]; }; then
            LEAST=$i
        fi
    done
    MIB=${FREE[LEAST]} IN_USE=$((TOTAL[LEAST] - FREE[LEAST]))
    if [ "$MIB" -gt 0 ]; then
        echo "Available GPU memory: $MIB MB (~$(( (MIB + 512) / 1024 )) GB)"
        [ "$IN_USE" -lt 1024 ] || echo "GPU ${IDS[LEAST]}: $IN_USE of its ${TOTAL[LEAST]} MB are in use already"
        CHECK+=(--gpu_memory "$MIB")
    else
        echo "Available GPU memory: nvidia-smi does not tell, so it is not checked"
    fi
fi
run "${CHECK[@]}"
if [ "$STATUS" -eq 3 ]; then
    printf '\n⚠️  Warning: GPU memory may be insufficient!\n'
    [ "$METHOD" = lora ] || echo "Consider using LoRA fine-tuning instead."
    if [ -z "$DRY_RUN$YES" ]; then
        [ -t 0 ] || fail "GPU memory may be insufficient, and there is no terminal to ask at. To continue anyway: --yes"
        ANSWER=""
        until [[ $ANSWER =~ ^([yY]|[yY][eE][sS])$ ]]; do
            printf 'Continue anyway? (y/n) '
            read -r ANSWER || ANSWER=n
            if [[ $ANSWER =~ ^([nN]|[nN][oO])$ ]]; then
                echo "Nothing was started."
                exit 0
            fi
        done
    fi
elif [ "$STATUS" -ne 0 ]; then
    exit "$STATUS"
fi
if [ -n "$DRY_RUN" ]; then
    printf '\nThe command:\n  %s\n' "$AS_TYPED"
    exit 0
fi

# ------------------------------------------------------------------------------------------------------------- training

cat <<EOF

🚀 Starting $KIND fine-tuning with SparseTrainer...
Training mode: $WHERE
Effective batch size: ${EFFECTIVE_BATCH_SIZE:-$PRESET}
$RULE
Using $USING...
EOF
run "${COMMAND[@]}"
if [ "$STATUS" -ne 0 ]; then
    [ -z "$INTERRUPTED" ] || echo "Interrupted. The same command goes on from the last checkpoint." >&2
    exit "$STATUS"
fi
[ "${NODE_RANK:-0}" = 0 ] || exit 0 # the model is on machine 0

cat <<EOF

✅ Fine-tuning finished: $OUTPUT_DIR

Next steps:
1. Evaluate the model:
   python main_block.py --model $(shown "$OUTPUT_DIR") --eval
2. Check that it is as sparse as before:
   from transformers import AutoModelForCausalLM
   from common.sparse_trainer import check_sparsity
   model = AutoModelForCausalLM.from_pretrained("$OUTPUT_DIR")
   print(f"Sparsity: {check_sparsity(model):.4f}")
EOF
