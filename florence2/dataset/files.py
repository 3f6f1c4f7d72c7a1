"""Many small files and links. Paths are texts here, because those of pathlib take as long as the files themselves."""

import os
from io import FileIO


class Files:
    """Makes files and links, and their folders, each once."""

    def __init__(self) -> None:
        self._folders: set[str] = set()

    def make_folder_of(self, path: str) -> None:
        """Make the folder of a file."""
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            self._folders.add(folder)

    def make(self, path: str, content: bytes | str) -> None:
        """Make a file of these bytes, or a symbolic link to this path. Raises OSError."""
        self.make_folder_of(path)
        if isinstance(content, str):
            os.symlink(content, path)  # noqa: PTH211
            return
        with FileIO(path, "w") as file:
            while content:  # a disk that is nearly full takes a part
                content = content[file.write(content) :]
