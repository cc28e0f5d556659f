"""What models read: text, pairs of texts, images or recordings, each declared once.

How samples of one are read and made stands in `data/modality.py`; here is what every room may know
without opening a file.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityKind:
    """What is known of the samples of a model before any is read.

    Attributes:
        name: of the modality.
        input: the input of a graph that reads it.
        unit: what samples are counted in.
        tokens: what a unit counts for in a budget of tokens.
        option: of the command line, that says how many units to evaluate on.
        step: what their number is rounded up to in advice.
        targets: a sample has a text beside it, that a decoder is to write.
        lacking: how samples came that have none, as a report says it.
        stand_in: what the decoder was run on instead, and what to do about it.
        has_length: its graphs are timed at several lengths of a sample.
    """

    name: str
    input: str
    unit: str
    tokens: int
    option: str
    step: int
    targets: bool = False
    lacking: str = ""
    stand_in: str = ""
    has_length: bool = True

    @property
    def is_counted_in_samples(self) -> bool:
        """Whether each sample is one unit."""
        return self.unit != "token"


TEXT = ModalityKind(
    name="text", input="input_ids", unit="token", tokens=1, option="--evaluation-tokens", step=1024
)
PAIRS = ModalityKind(
    name="pairs",
    input="input_ids",
    unit="token",
    tokens=1,
    option="--evaluation-tokens",
    step=1024,
    targets=True,
    lacking="texts came without a target",
    stand_in="writing the text that the encoder reads; pass JSONL "
    'with {"text": "...", "target": "..."} per line.',
)
IMAGES = ModalityKind(
    name="images",
    input="pixel_values",
    unit="image",
    # Transformers make some 200 patches of an image, convolutions take less time for it.
    tokens=64,
    option="--images",
    step=1,
    has_length=False,
)
RECORDINGS = ModalityKind(
    name="recordings",
    input="input_features",
    unit="recording",
    # Longer than an image, and so dearer.
    tokens=512,
    option="--recordings",
    step=1,
    targets=True,
    lacking="recordings came without a transcript",
    stand_in="what the dense model writes of them; put a .txt file beside each.",
)
MODALITIES = {kind.name: kind for kind in (TEXT, PAIRS, IMAGES, RECORDINGS)}


def modality_of_inputs(inputs: frozenset[str], *, targets: bool) -> ModalityKind:
    """What a model with these inputs reads; text where no input tells."""
    fitting = [kind for kind in MODALITIES.values() if kind.input in inputs]
    fitting = fitting or [PAIRS if targets else TEXT]
    return next((kind for kind in fitting if kind.targets == targets), fitting[0])


def modality_of_unit(unit: str, *, targets: bool) -> ModalityKind:
    """The modality of samples that are counted in this unit, with targets beside them or not."""
    fitting = [kind for kind in MODALITIES.values() if kind.unit == unit]
    return next((kind for kind in fitting if kind.targets == targets), fitting[0])
