"""One model of each kind."""

folder_names_and_paths = {"vae": (["/", "/not/there"], {".safetensors"}), "clip": (["/"], set())}


def get_filename_list(kind: str) -> list[str]:
    return [f"some.{kind}"]


def get_full_path_or_raise(kind: str, name: str) -> str:
    return f"/models/{kind}/{name}"


def get_folder_paths(kind: str) -> list[str]:
    return [f"/models/{kind}"]
