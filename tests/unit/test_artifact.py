"""The files of a registered model are exactly those with the registered checksums."""

import pytest

from ivegan import storage
from ivegan.errors import UserError
from pipelines.models.artifact import FILES, check_sums, write_sums


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("data/data.pkl", b"", r"data/data\.pkl is not expected"),
        ("SHA256SUMS", b"", "SHA256SUMS .* not the one that was registered"),
        ("SHA256SUMS", None, "SHA256SUMS .* is missing"),
    ],
)
def test_checksums_notice_every_change(tmp_path, name, content, sentence):
    for file in FILES:
        storage.write_bytes(tmp_path / file, file.encode())
    digest = write_sums(tmp_path)
    check_sums(tmp_path, digest)
    if content is None:
        (tmp_path / name).unlink()
    else:
        storage.write_bytes(tmp_path / name, content)
    with pytest.raises(UserError, match=sentence):
        check_sums(tmp_path, digest)
