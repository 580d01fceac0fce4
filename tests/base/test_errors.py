"""The one tree of errors: its shape, the fields and texts of its classes, and where each errno lands."""

from __future__ import annotations

import copy
import errno
import inspect
import os
import pickle
import re

import pytest

from blocklayer.base import errors
from blocklayer.base.errors import (
    AccessDeniedError,
    BlockError,
    CorruptImageError,
    IOFailedError,
    JobCancelledError,
    JobError,
    LockedError,
    MissingFileError,
    NoSpaceError,
    OptionError,
    OutOfRangeError,
    ProtocolError,
    ReferenceRefusedError,
    TimedOutError,
    UnsupportedFeatureError,
    UsageError,
    from_os_error,
    io_error,
)

CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BlockError)}


def drawn_parents():
    """Parent of each class as the text at the top of the module draws it."""
    parents, above = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([| ]*)(?:\+-- )?(\w+Error)\b", line)
        if match:
            depth = len(match[1]) // 4 + ("+--" in line)
            above[depth:] = [match[2]]
            parents[match[2]] = above[depth - 1] if depth else None
    return parents


def test_the_tree_is_as_it_is_drawn():
    actual = {
        name: next((base.__name__ for base in kind.__bases__ if base in CLASSES.values()), None)
        for name, kind in CLASSES.items()
    }
    assert actual == drawn_parents()


def test_a_mistake_of_the_caller_is_a_value_error_and_failed_storage_an_os_error():
    assert {name for name, kind in CLASSES.items() if issubclass(kind, ValueError)} == {
        name for name, kind in CLASSES.items() if issubclass(kind, UsageError)
    }
    assert {name for name, kind in CLASSES.items() if issubclass(kind, OSError)} == {
        name for name, kind in CLASSES.items() if issubclass(kind, IOFailedError)
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "it broke"),
        ({"node": "disk"}, "node 'disk': it broke"),
        ({"filename": "a.raw"}, "file 'a.raw': it broke"),
        ({"offset": 4096}, "it broke (at 0x1000)"),
        ({"offset": 0, "length": 512}, "it broke (at 0x0+512)"),
        ({"length": 512}, "it broke"),
        (
            {"node": "disk", "filename": "a.raw", "offset": 65536, "length": 0},
            "node 'disk': file 'a.raw': it broke (at 0x10000+0)",
        ),
    ],
)
@pytest.mark.parametrize("kind", [OutOfRangeError, CorruptImageError, IOFailedError, LockedError])
def test_the_text_says_where_as_far_as_that_is_known(kind, fields, expected):
    error = kind("it broke", **fields)
    assert str(error) == expected
    known = {"message": "it broke", "node": None, "filename": None, "offset": None, "length": None} | fields
    assert {name: getattr(error, name) for name in known} == known


def test_a_file_that_the_message_names_is_not_named_twice():
    assert str(OptionError("cannot open 'a.raw' twice", filename="a.raw")) == "cannot open 'a.raw' twice"


def test_fields_that_are_learnt_later_appear_in_the_text():
    error = io_error(errno.EIO, "read", offset=512)
    error.node = "disk"
    assert str(error) == "node 'disk': read failed: Input/output error (at 0x200)"


def test_an_error_that_is_not_told_its_errno_is_eio():
    assert IOFailedError("bad medium").errno == errno.EIO


def test_a_broken_protocol_is_failed_storage_with_an_errno_of_its_own():
    error = ProtocolError("a reply begins with 00000000", node="disk")
    assert (error.errno, str(error)) == (errno.EPROTO, "node 'disk': a reply begins with 00000000")


def test_unsupported_features_a_refused_reference_and_a_job_are_named_by_fields():
    features = UnsupportedFeatureError("unknown features", features=("zip", "bit 7"), filename="a.qcow2")
    refused = ReferenceRefusedError("refused to open it", reference="json:{}", filename="a.qcow2")
    job = JobCancelledError("it was cancelled", job="job0")
    assert (features.features, str(features)) == (("zip", "bit 7"), "file 'a.qcow2': unknown features")
    assert (refused.reference, str(refused)) == ("json:{}", "file 'a.qcow2': refused to open it")
    assert (job.job, str(job), isinstance(job, JobError)) == ("job0", "it was cancelled", True)


KINDS_BY_ERRNO = {
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EFBIG: NoSpaceError,
    errno.ENOENT: MissingFileError,
    errno.EACCES: AccessDeniedError,
    errno.EPERM: AccessDeniedError,
    errno.EROFS: AccessDeniedError,
    errno.ETIMEDOUT: TimedOutError,
}


@pytest.mark.parametrize("code", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_errno_lands_in_its_class_and_is_kept(code):
    error = io_error(code, "write", node="disk", filename="a.raw", offset=512, length=1024)
    assert type(error) is KINDS_BY_ERRNO.get(code, IOFailedError)
    assert (error.errno, error.node, error.filename, error.offset, error.length) == (code, "disk", "a.raw", 512, 1024)
    assert str(error) == f"node 'disk': file 'a.raw': write failed: {os.strerror(code)} (at 0x200+1024)"


def test_an_error_of_the_operating_system_is_mapped_with_its_errno():
    error = from_os_error(OSError(errno.ENOSPC, "whatever"), "write", filename="a.raw", offset=0, length=1)
    assert (type(error), error.errno) == (NoSpaceError, errno.ENOSPC)
    assert str(error) == "file 'a.raw': write failed: No space left on device (at 0x0+1)"


def test_an_error_that_is_mapped_already_stays_itself():
    error = io_error(errno.EROFS, "open", filename="a.raw")
    assert from_os_error(error, "write", filename="b.raw") is error


def test_an_error_without_errno_is_eio():
    error = from_os_error(OSError("something"), "read")
    assert (type(error), error.errno, str(error)) == (IOFailedError, errno.EIO, "read failed: Input/output error")


def examples():
    for kind in CLASSES.values():
        wanted = {"node": "disk", "filename": "a.raw", "offset": 512, "length": 8, "errno": errno.EROFS}
        wanted |= {"features": ("zip",), "reference": "b.raw", "job": "job0"}
        known = inspect.signature(kind).parameters
        yield kind("it broke", **{name: value for name, value in wanted.items() if name in known})


FIELDS = (
    "args",
    "message",
    "node",
    "filename",
    "offset",
    "length",
    "errno",
    "features",
    "reference",
    "job",
    "__notes__",
)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", [*examples()], ids=lambda error: type(error).__name__)
def test_an_error_comes_whole_out_of_another_process(error, duplicate):
    error.add_note("seen by the worker")
    same = duplicate(error)
    assert (type(same), str(same)) == (type(error), str(error))
    assert {name: getattr(same, name, None) for name in FIELDS} == {name: getattr(error, name, None) for name in FIELDS}
