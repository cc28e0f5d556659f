"""What is told of a machine."""

from prox24_deploy.core.host import gib_free, gib_needed


def test_room_is_told_as_it_was_given_and_never_as_more() -> None:
    for hundredths in range(1, 300):
        given = int(hundredths / 100 * 2**30)
        assert gib_free(given) == f"{hundredths / 100:.2f} GiB"
        assert gib_free(given - 1000) == f"{(hundredths - 1) / 100:.2f} GiB"
        assert gib_needed(given + 1000) == f"{(hundredths + 1) / 100:.2f} GiB"
