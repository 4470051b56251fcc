"""The object store as a file system of pyarrow, for Ray, through the client of all other accesses.

pyarrow's own S3 client finds endpoint, authorities, proxies and keys in fewer places than botocore.
"""

import io
from pathlib import PurePosixPath
from typing import Any

from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType

from ivegan import storage
from ivegan.storage import objects
from ivegan.storage.errors import sentences


class ObjectFiles(FileSystemHandler):
    """Paths are ``bucket/key``; a folder exists while a file is in it.

    An instance holds nothing, so that no key travels with it to another node.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectFiles)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [_info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir
        sizes = storage.list_files(f"s3://{base}")
        if not sizes and not selector.allow_not_found:
            raise FileNotFoundError(base)
        folders = {str(p) for name in sizes for p in PurePosixPath(name).parents} - {"."}
        infos = [FileInfo(f"{base}/{name}", FileType.Directory) for name in sorted(folders)]
        infos += [FileInfo(f"{base}/{name}", FileType.File, size=n) for name, n in sizes.items()]
        depth = base.count("/") + 1
        return [i for i in infos if selector.recursive or i.path.count("/") == depth]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: a file's name makes its folders."""

    def delete_dir(self, path: str) -> None:
        storage.delete_folder(f"s3://{path}")

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_file(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        with sentences(f"s3://{path}"):
            objects.s3_client().delete_object(Bucket=bucket, Key=key)

    def open_input_file(self, path: str) -> PythonFile:
        return PythonFile(storage.open_file(f"s3://{path}"), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_Upload(f"s3://{path}"), mode="w")

    def _refuse(self, *_: Any) -> Any:
        raise NotImplementedError("Ray does not ask for it")

    delete_root_dir_contents = move = copy_file = open_append_stream = _refuse


class _Upload(io.BytesIO):
    """A new object, whose content is sent when it is closed."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri

    def close(self) -> None:
        if self.closed:
            return
        try:
            storage.write_bytes(self._uri, self.getvalue())
        finally:
            super().close()

    def __del__(self) -> None:
        """Send nothing: what was not closed is not whole.

        A finalizer may run in the midst of any call, whose locks an upload would wait for.
        """


def _info(path: str) -> FileInfo:
    bucket, _, key = path.strip("/").partition("/")
    with sentences(f"s3://{path}"):
        found = objects.head((bucket, key)) if key else None
    if found is not None:
        return FileInfo(path, FileType.File, size=found["ContentLength"])
    kind = FileType.Directory if storage.exists(f"s3://{path}") else FileType.NotFound
    return FileInfo(path, kind)
