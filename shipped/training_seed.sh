#!/usr/bin/env bash
# MDLM and XDLM (k = 0.1) trained once more, from another seed, on the shipped tokenizer's codes, and judged as the
# shipped ones are: how much does a comparison owe to the seed of the training? fid.json of each seed in
# shipped/fashion_mnist/training_seeds was made so; benchmarks/few_steps.py compares them, and
# benchmarks/samplers_trainings.py draws from RUNS/pipelines/seed* by tuned samplers.
#
#   shipped/training_seed.sh 1     trains from seed 1: hours on two CPU cores
#   shipped/training_seed.sh 0     draws from the shipped models, in float32 like those of the other seeds
#   RUNS=runs/time shipped/training_seed.sh 0 --model.time_conditioning time     trains with options of `train`, from seed 0
#
# RUNS=FOLDER says where everything goes, NAMES="xdlm-0.1 udlm" which of the shipped models are trained (default: mdlm and
# xdlm-0.1). Killed, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

seed=${1:-}
[[ "$seed" =~ ^[0-9]+$ ]] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
shift
runs=${RUNS:-runs/training_seeds}
read -ra names <<<"${NAMES:-mdlm xdlm-0.1}"
models=shipped/fashion_mnist
pipelines=$models/pipelines
export OMP_NUM_THREADS=1 # one core a training
if ((seed || $#)); then
    xdlm-image encode --config fashion_mnist/encode --tokenizer "$pipelines/mdlm/vqvae" --output_dir "$runs/codes"
    running=()
    trap '((${#running[@]})) && kill "${running[@]}" 2>/dev/null' EXIT
    for name in "${names[@]}"; do
        xdlm-image train --config "$models/training/$name/recipe.yaml" --seed "$seed" --mixed_precision no \
            --codes "$runs/codes/train" --validation_codes "$runs/codes/validation" \
            --tokenizer "$pipelines/mdlm/vqvae" --output_dir "$runs/$name-seed$seed" "$@" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process"; done
    running=()
    pipelines=$runs/pipelines/seed$seed
    python - "$runs" "$seed" "$pipelines" "${names[@]}" <<'PYTHON'
import sys
import torch
from xdlm_image import XDLMPipeline
runs, seed, pipelines, *names = sys.argv[1:]
for name in names:
    pipeline = XDLMPipeline.from_pretrained(f"{runs}/{name}-seed{seed}/pipeline")
    pipeline.transformer.to(torch.float16)  # as shipped
    pipeline.vqvae.to(torch.float16)
    pipeline.save_pretrained(f"{pipelines}/{name}")
PYTHON
fi
drawn=""
for name in "${names[@]}"; do drawn+=", $name: $pipelines/$name"; done
xdlm-image evaluate --pipelines "{${drawn#, }}" \
    --reference "$models/reference" --extractor "$models/extractor" --num_steps '[4, 8]' --num_samples 5000 \
    --seeds '[0]' --dtype float32 --compile true --output_dir "$runs/evaluation-seed$seed"
