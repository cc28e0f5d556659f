"""The tasks that a model can be for, each declared once."""

from dataclasses import dataclass
from typing import Literal

# What a model is for, by the names that the Hugging Face Hub has for it.
Task = Literal[
    "feature-extraction",
    "text-encoding",
    "text-generation",
    "text-to-text",
    "automatic-speech-recognition",
    "text-classification",
    "token-classification",
    "image-classification",
    "image-feature-extraction",
]
# How a model is measured against its dense twin, and what its pruning is held to.
Judging = Literal["language", "speech", "classes", "embeddings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """What a task means for all that is done with a model.

    Attributes:
        name: as recipes have it.
        auto_class: the class of transformers that opens a model for it.
        judged_by: which evaluation measures it.
        output: what its graph gives, and the axes of that; None where no recipe can be drawn.
        class_names: how names of classes of transformers for it end; the longest that fits decides.
        two_graphs: it has an encoder and a decoder, which become two graphs.
        decoder_alone: it predicts each next token of one stream of text, and may keep a cache.
        writes_text: it writes text, one token after the other.
        embeds_text: it gives hidden states of texts, to be pooled into embeddings.
        hub_name: what the Hugging Face Hub calls it, "" where that is its name.
    """

    name: Task
    auto_class: str
    judged_by: Judging
    output: tuple[str, tuple[str, ...]] | None = None
    class_names: tuple[str, ...] = ()
    two_graphs: bool = False
    decoder_alone: bool = False
    writes_text: bool = False
    embeds_text: bool = False
    hub_name: str = ""


_STATES = ("last_hidden_state", ("batch", "sequence", "hidden"))

TEXT_GENERATION = TaskKind(
    name="text-generation",
    auto_class="AutoModelForCausalLM",
    judged_by="language",
    output=("logits", ("batch", "sequence", "vocabulary")),
    class_names=("ForCausalLM", "LMHeadModel"),
    decoder_alone=True,
    writes_text=True,
)
TEXT_CLASSIFICATION = TaskKind(
    name="text-classification",
    auto_class="AutoModelForSequenceClassification",
    judged_by="classes",
    output=("logits", ("batch", "labels")),
    class_names=("ForSequenceClassification",),
)
FEATURE_EXTRACTION = TaskKind(
    name="feature-extraction",
    auto_class="AutoModel",
    judged_by="embeddings",
    output=_STATES,
    class_names=("",),
    embeds_text=True,
)

TASKS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        TEXT_GENERATION,
        TaskKind(
            name="text-to-text",
            auto_class="AutoModelForSeq2SeqLM",
            judged_by="language",
            two_graphs=True,
            writes_text=True,
        ),
        TaskKind(
            name="automatic-speech-recognition",
            auto_class="AutoModelForSpeechSeq2Seq",
            judged_by="speech",
            two_graphs=True,
            writes_text=True,
        ),
        TEXT_CLASSIFICATION,
        TaskKind(
            name="token-classification",
            auto_class="AutoModelForTokenClassification",
            judged_by="classes",
            output=("logits", ("batch", "sequence", "labels")),
            class_names=("ForTokenClassification",),
        ),
        TaskKind(
            name="image-classification",
            auto_class="AutoModelForImageClassification",
            judged_by="classes",
        ),
        FEATURE_EXTRACTION,
        TaskKind(
            name="text-encoding",
            auto_class="AutoModelForTextEncoding",
            judged_by="embeddings",
            output=_STATES,
            class_names=("EncoderModel",),
            embeds_text=True,
            hub_name="feature-extraction",
        ),
        TaskKind(
            name="image-feature-extraction",
            auto_class="AutoModel",
            judged_by="embeddings",
        ),
    )
}


def task_of_class(architecture: str) -> TaskKind:
    """The task that a class of transformers seems to be for, by how its name ends."""
    endings = {ending: kind for kind in TASKS.values() for ending in kind.class_names}
    return endings[max((e for e in endings if architecture.endswith(e)), key=len)]
