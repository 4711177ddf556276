"""What the adapter asks torch, without its seconds of import."""


def get_num_threads():
    return 1


class cuda:  # noqa: N801 - torch's name
    """There is none."""

    @staticmethod
    def is_available():
        return False
