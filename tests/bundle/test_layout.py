"""Which folder of a bundle is shipped."""

from prox24_deploy.bundle.layout import shipped_folder


def test_what_was_recovered_is_shipped_and_else_what_was_pruned() -> None:
    pruned = ["stages/prune.json", "pruned/model.safetensors"]
    assert shipped_folder(pruned) == "pruned"
    assert shipped_folder([*pruned, "stages/recover.json", "recovered/x"]) == "recovered"
    # A folder alone is what a kill left there.
    assert shipped_folder([*pruned, "recovered/x"]) == "pruned"
