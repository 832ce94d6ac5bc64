"""One model of each kind."""


def get_filename_list(kind: str) -> list[str]:
    return [f"some.{kind}"]


def get_full_path_or_raise(kind: str, name: str) -> str:
    return f"/models/{kind}/{name}"
