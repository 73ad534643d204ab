"""What is read first, in a blob of its own."""

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import Image, ImageBuilder
from rafs_v6.check import check
from rafs_v6.hot import gather
from rafs_v6.layout import Compressor, Digest, ExtendedSuperblock
from rafs_v6.owners import Place, files
from rafs_v6.pack import Chunks, Format
from tests.rafs_v6.oracle import extracted, mounted, told_by_directory
from tests.rafs_v6.test_build import forms, trees
from tests.rafs_v6.test_check import edit
from tests.rafs_v6.trees import Built, build, directory, everything, regular, told_by_bootstrap

PAGES = Format(chunk_bytes=4096)


def gathered(built, hot, blobs=None):
    """The image with these chunks gathered."""
    output = io.BytesIO()
    blobs = built.blobs if blobs is None else blobs

    def read(entry, start, end):
        return blobs[entry.blob_id][start:end]

    image = gather(Bootstrap(built.image.bootstrap), hot, read, output)
    new = image.blobs[-1].blob_id
    known = {**built.blobs, new: output.getvalue()}
    result = Built(image, {blob.blob_id: known[blob.blob_id] for blob in image.blobs})
    assert check(image.bootstrap, result.blobs) == []
    return result


def places_of(built):
    """Every chunk of every file."""
    image = Bootstrap(built.image.bootstrap)
    return {file.path: places for file, places in files(image)}


def test_hot_chunks_are_together_in_the_order_of_reading():
    """The rest stays where it was, and so do the other blobs."""
    tree = directory({name: regular(name * 6000) for name in (b"a", b"b", b"c")})
    built = build(tree, form=Format(compressor=Compressor.NONE, chunk_bytes=4096))
    places = places_of(built)
    image = gathered(built, [places[b"/c"][1], places[b"/a"][0], places[b"/c"][1]])
    old, hot = image.image.blobs
    assert old == built.image.blobs[0]
    assert image.blobs[hot.blob_id].startswith(b"c" * (6000 - 4096) + b"a" * 4096)
    assert hot.chunk_count == 2
    assert told_by_bootstrap(image) == told_by_bootstrap(built)


def test_a_blob_of_which_nothing_is_read_any_more_leaves_the_image():
    """Nobody needs a device without readers."""
    built = build(
        directory({b"a": regular(b"a" * 5000)}), directory({b"b": regular(b"b" * 5000)}), form=PAGES
    )
    image = gathered(built, places_of(built)[b"/a"])
    assert [blob.blob_index for blob in image.image.blobs] == [0, 1]
    assert image.image.blobs[0].blob_id == built.image.blobs[1].blob_id
    again = gathered(image, places_of(image)[b"/a"] + places_of(image)[b"/b"])
    assert len(again.image.blobs) == 1
    assert told_by_bootstrap(again) == told_by_bootstrap(built)


def test_data_that_two_blobs_have_is_gathered_once():
    """Other builders store it twice; a chunk table has one line for it per blob."""
    same, parts, blobs = b"s" * 4096, {}, {}
    for layer, name in enumerate((b"a", b"b")):
        builder, output = ImageBuilder(PAGES), io.BytesIO()
        node = regular(same + name)
        blob = builder.add(directory({name: node}), output)
        chunks = [chunk._replace(layer=layer) for chunk in builder._chunks.of[node]]
        parts[name], blobs[blob] = (node, chunks), output.getvalue()
    tree = directory({name: node for name, (node, _) in parts.items()})
    image = ImageBuilder.resumed(PAGES, tree, Chunks({}, dict(parts.values())), blobs).finish()
    built = Built(image, {blob.blob_id: data for blob, data in blobs.items()})
    places = [place for each in places_of(built).values() for place in each]
    (hot,) = gathered(built, places).image.blobs
    assert (len(places), hot.chunk_count) == (4, 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(trees, min_size=1, max_size=2), forms, st.randoms())
def test_any_chunks_of_any_image_can_be_gathered(layers, form, rng):
    """Whatever moves, every fact of every file is what it was; our check and reader are content."""
    built = build(*layers, form=form)
    places = [place for each in places_of(built).values() for place in each]
    hot = rng.sample(places, rng.randint(0, len(places)))
    if not hot:
        with pytest.raises(ImageError, match="none of the chunks"):
            gathered(built, hot)
        return
    assert told_by_bootstrap(gathered(built, hot)) == told_by_bootstrap(built)


def test_kernel_and_fsck_read_what_was_gathered(tmp_path):
    """A file whose chunks were one extent is torn, and the kernel is told so."""
    tree = everything()
    del tree.children[b"dev"]
    tree.children[b"large"] = regular(random.Random(3).randbytes(9 * 4096))
    built = build(tree, form=PAGES)
    places = places_of(built)
    hot = [places[b"/large"][4], *places[b"/big"], places[b"/large"][8], *places[b"/zeros"]]
    image = gathered(built, hot)
    expected = told_by_bootstrap(built)
    found = told_by_directory(extracted(image, tmp_path))
    assert {path: facts.content for path, facts in found.items()} == {
        path: facts.content for path, facts in expected.items()
    }
    with mounted(image, tmp_path) as root:
        assert told_by_directory(root) == expected


def test_an_image_of_nydus_can_be_gathered(nydus_bootstrap, nydus_blob):
    """A foreign image keeps its facts, and what it says of its own blob."""
    image = Bootstrap(nydus_bootstrap)
    built = Built(Image(nydus_bootstrap, image.blobs), {image.blobs[0].blob_id: nydus_blob})
    places = places_of(built)
    result = gathered(built, places[b"/sync_io.rs"])
    assert result.image.blobs[0] == image.blobs[0]
    assert told_by_bootstrap(result) == told_by_bootstrap(built)


@pytest.mark.parametrize("digester", Digest)
def test_damage_is_not_passed_on(digester):
    """Bytes that are wrong get no new digest."""
    form = Format(compressor=Compressor.NONE, digester=digester)
    built = build(directory({b"a": regular(b"a" * 5000)}), form=form)
    damaged = {name: b"X" + blob[1:] for name, blob in built.blobs.items()}
    with pytest.raises(ImageError, match="wrong bytes"):
        gathered(built, [Place(0, 0)], damaged)


def test_an_image_that_cannot_be_gathered_says_why(nydus_bootstrap, nydus_blob):
    """Without a chunk table nobody knows what its chunks must be."""
    bootstrap = bytearray(nydus_bootstrap)
    edit(bootstrap, ExtendedSuperblock, 1152, chunk_table_size=0)
    built = Built(Image(bytes(bootstrap), ()), {})
    with pytest.raises(ImageError, match="not in the chunk table"):
        gathered(built, [Place(0, 0)])
