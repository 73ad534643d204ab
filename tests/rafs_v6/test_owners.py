"""The way back from chunks to names."""

import random

import pytest
from hypothesis import given, settings

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import ChunkIndex
from rafs_v6.owners import OWNERS_LIMIT, Place, files, owners
from rafs_v6.pack import Format
from tests.rafs_v6.test_build import trees
from tests.rafs_v6.trees import build, directory, regular

PAGES = Format(chunk_bytes=4096)


def image_of(*layers, form=PAGES):
    return Bootstrap(build(*layers, form=form).image.bootstrap)


def test_a_chunk_leads_to_its_file():
    """Each chunk of a file has that file for its owner; an empty file owns none."""
    content = random.Random(1).randbytes(9000)
    image = image_of(directory({b"d": directory({b"f": regular(content), b"e": regular()})}))
    ((file, places),) = files(image)
    assert (file.path, file.size_bytes, file.chunk_count) == (b"/d/f", 9000, 3)
    assert places == [Place(0, 0), Place(0, 4096), Place(0, 8192)]
    assert {place: known.files for place, known in owners(image, places).items()} == dict.fromkeys(
        places, (file,)
    )


def test_a_hard_link_is_one_file():
    """The second name of a file adds neither an owner nor a file."""
    linked = regular(b"linked")
    image = image_of(directory({b"b": linked, b"a": linked}))
    ((file, (place,)),) = files(image)
    assert file.path == b"/a"
    assert owners(image, [place])[place].total == 1


def test_equal_files_own_a_chunk_together_and_only_some_are_named():
    """A chunk that everybody has costs no more than one that a few have."""
    image = image_of(directory({b"%03d" % n: regular(b"same") for n in range(100)}))
    (known,) = owners(image, [Place(0, 0)]).values()
    assert [file.path for file in known.files] == [b"/%03d" % n for n in range(OWNERS_LIMIT)]
    assert known.total == 100


def test_a_place_without_a_chunk_has_no_owner():
    """Neither beyond the blob nor inside a chunk: nobody."""
    image = image_of(directory({b"f": regular(b"f" * 5000)}))
    assert owners(image, [Place(0, 1), Place(0, 1 << 40), Place(7, 0)]) == {}


def test_a_file_whose_chunks_lead_nowhere_is_an_error(nydus_bootstrap):
    """A damaged index ends the walk; nothing is guessed."""
    damaged = bytearray(nydus_bootstrap)
    damaged[12512:12520] = ChunkIndex(0, 2, 0).pack()
    with pytest.raises(ImageError, match="beyond its blob"):
        owners(Bootstrap(damaged), [Place(0, 0)])


@settings(max_examples=20, deadline=None)
@given(trees)
def test_every_chunk_of_every_file_is_found_back(tree):
    """Whatever the tree: the way back undoes the way there, for every chunk there is."""
    image = image_of(tree)
    there = {}
    for file, places in files(image):
        for place in set(places):
            there.setdefault(place, []).append(file)
    back = owners(image, there)
    assert back.keys() == there.keys()
    for place, known in back.items():
        assert list(known.files) == there[place][:OWNERS_LIMIT]
        assert known.total == len(there[place])
