#!/usr/bin/env bash
# Everything that a folder of models for `xdlm-image demo` holds, from raw images on: shipped/fashion_mnist was made so.
#
#   shipped/train.sh cpu     the shipped models: 7x7 codes, 2.0M parameters; hours on two CPU cores with bfloat16 units
#   shipped/train.sh gpu     larger: 14x14 codes, 33M parameters; one GPU
#   shipped/train.sh smoke   the whole path in minutes, worth nothing (what the tests run)
#
# RUNS=FOLDER and MODELS=FOLDER say where runs and models go. Killed, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

size=${1:-}
runs=${RUNS:-runs/shipped-$size}
models=${MODELS:-$runs/models}
drawing=(xdlm-image)
declare -A k=([mdlm]=0 [xdlm-0.1]=0.1 [xdlm-0.5]=0.5 [udlm]=1) rate
case "$size" in
    cpu)
        classifier=()
        tokenizer=(--max_steps 6000 --mixed_precision bf16 --compile true)
        train=(--max_steps 2500 --optimizer muon --mixed_precision bf16 --compile true
            --attention_backend _native_math)
        rate=([mdlm]=8e-3 [xdlm-0.1]=8e-3 [xdlm-0.5]=8e-3 [udlm]=8e-3)
        nelbo=(--num_images 3000)
        evaluate=(--num_samples 5000 --seeds '[0, 1, 2]' --dtype bfloat16 --compile true)
        at_once=2
        export OMP_NUM_THREADS=1 # one core a training, and two processes where images are drawn
        drawing=(env ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 -m xdlm_image.cli)
        ;;
    gpu)
        classifier=(--batch_size 256)
        tokenizer=(--model.block_out_channels '[64, 128]' --model.latent_channels 64 --batch_size 128
            --max_steps 20000 --mixed_precision bf16 --num_workers 4)
        train=(--model.num_layers 12 --model.num_attention_heads 6 --model.attention_head_dim 64 --batch_size 256
            --max_steps 40000 --optimizer muon --mixed_precision bf16 --compile true --validate_every 2000 --sample_every 5000
            --checkpoint_every 2000)
        rate=([mdlm]=1e-3 [xdlm-0.1]=1e-3 [xdlm-0.5]=1e-3 [udlm]=1e-3)
        nelbo=()
        evaluate=(--num_samples 5000 --seeds '[0, 1, 2]' --dtype bfloat16 --batch_size 1000)
        at_once=4
        ;;
    smoke)
        classifier=(--epochs 1 --width 8 --feature_dim 16)
        tokenizer=(--max_steps 20 --plain_steps 5 --warmup_steps 5)
        train=(--max_steps 4 --optimizer muon --warmup_steps 2 --batch_size 16 --validation_samples 32 --sample_every 0)
        rate=([mdlm]=2e-3 [xdlm-0.1]=2e-3 [xdlm-0.5]=2e-3 [udlm]=2e-3)
        nelbo=(--num_images 80 --num_times 1)
        evaluate=(--num_samples 20 --seeds '[0]' --num_steps '[1, 2]')
        at_once=1
        ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
# Classifiers that see the data in another order, from other weights: the judge of FID, and the eyes of the tokenizer's
# loss.
xdlm-image train-extractor --config fashion_mnist/extractor --output_dir "$models/extractor" "${classifier[@]}"
xdlm-image train-extractor --config fashion_mnist/extractor --output_dir "$runs/perceptual" "${classifier[@]}" --seed 1

xdlm-image train-tokenizer --config fashion_mnist/tokenizer --output_dir "$runs/tokenizer" \
    --extractor "$models/extractor" --perceptual "$runs/perceptual" "${tokenizer[@]}"
xdlm-image encode --config fashion_mnist/encode --tokenizer "$runs/tokenizer" --output_dir "$runs/codes"

# The four transformers: one recipe but for k, and the learning rate that suited k in short runs. None outlives the
# script: the next one would train beside it in the same folder.
running=()
trap '((${#running[@]})) && kill "${running[@]}" 2>/dev/null' EXIT
for name in mdlm xdlm-0.1 xdlm-0.5 udlm; do
    xdlm-image train --config fashion_mnist/xdlm --process.k "${k[$name]}" --learning_rate "${rate[$name]}" \
        --codes "$runs/codes/train" --validation_codes "$runs/codes/validation" --tokenizer "$runs/tokenizer" \
        --output_dir "$runs/$name" "${train[@]}" &
    running+=($!)
    if ((${#running[@]} == at_once)); then
        for process in "${running[@]}"; do wait "$process"; done
        running=()
    fi
done

# A third, wider classifier only checks whether samples are of the class that was asked for.
xdlm-image train-extractor --config fashion_mnist/extractor --width 48 --feature_dim 192 "${classifier[@]}" --seed 2 \
    --output_dir "$runs/independent"

python shipped/collect.py "$runs" "$models"
xdlm-image reference --data.name fashion-mnist --extractor "$models/extractor" --output_dir "$models/reference" \
    --tokenizers "[$models/pipelines/mdlm/vqvae]" --num_samples '[1000, 5000]'

pipelines="{mdlm: $models/pipelines/mdlm, xdlm-0.1: $models/pipelines/xdlm-0.1, \
xdlm-0.5: $models/pipelines/xdlm-0.5, udlm: $models/pipelines/udlm}"
# How well they foretell held-out codes: those of the collected tokenizer, whose float16 weights round otherwise.
xdlm-image encode --config fashion_mnist/encode --tokenizer "$models/pipelines/mdlm/vqvae" --splits '[test]' \
    --output_dir "$runs/codes_of_models"
xdlm-image nelbo --pipelines "$pipelines" --codes "$runs/codes_of_models/test" --output_dir "$runs/nelbo" "${nelbo[@]}"
"${drawing[@]}" evaluate --pipelines "$pipelines" --data.name fashion-mnist --extractor "$models/extractor" \
    --classifier "$runs/independent" --nelbo "$runs/nelbo/nelbo.json" --output_dir "$runs/evaluation" \
    "${evaluate[@]}"
python shipped/collect.py "$runs" "$models" --evaluation
echo "xdlm-image demo --models $models"
