"""Streams are the image codec's, weights are counted and saved, and nothing is read otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from codecs_of_images import tiny_codec
from streams import buffers_nbytes, embed

from fastcil.compression.codec import ImageCodec
from fastcil.compression.model import CodecModel
from fastcil.compression.saving import save_codec
from fastcil.compression.zoo import build_model
from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import Budget, ByteStore, Memory, check_codec, codec_overhead, make_codec
from fastcil.memory.codecs import learned

SIZES = [(1, 1), (1, 9), (9, 1), (7, 13), (64, 64), (65, 40), (7, 13)]
READS = ("entropy.", "decoder.", "embeddings.entropy.", "embeddings.decoder.")


def rounded(model: CodecModel, dtype: torch.dtype = torch.float16) -> CodecModel:
    """The same model with the weights that memory keeps."""
    other = build_model(model.structure())
    other.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in model.state_dict().items()})
    return other.eval()


def pictures(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def draw(rng, labels):
    """Images of two sizes, as few as will do: each size goes through the networks by itself."""
    images = [
        rng.integers(0, 256, ((12, 10), (9, 14))[k % 2] + (3,), dtype=np.uint8)
        for k in range(len(labels))
    ]
    return Examples(ImageStore.from_images(images), torch.tensor(labels))


def stream(seed, classes, each=5):
    """Tasks of so many new classes, with no exemplars."""
    rng = np.random.default_rng(seed)
    known = 0
    for index, fresh in enumerate(classes):
        new = tuple(range(known, known + fresh))
        examples = draw(rng, [label for label in new for _ in range(each)])
        yield Task(index, new, known, examples, examples.select([]))
        known += fresh


@pytest.fixture(scope="module")
def model():
    return tiny_codec()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "tiny.safetensors"
    save_codec(path, model)
    return str(path)


@pytest.fixture
def codec(checkpoint):
    return make_codec("learned", checkpoint=checkpoint)


def fine_tuned(model: CodecModel, path, part: str = "decoder") -> str:
    """A checkpoint with another decoder, or another entropy model."""
    other = build_model(model.structure())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith((part, "encoder")):
                parameter.mul_(1.3)
    save_codec(path, other)
    return str(path)


@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [("hierarchical-tiny", "fp16", torch.float16), ("msh-vr", "fp32", torch.float32)],
)
def test_streams_and_images_are_the_image_codec_s(name, precision, dtype, tmp_path):
    model, path = tiny_codec(name), tmp_path / "codec.safetensors"
    save_codec(path, model)
    codec = make_codec("learned", checkpoint=str(path), lmbda=200.0, precision=precision)
    reference, images = ImageCodec(rounded(model, dtype)), pictures()
    kept = codec.encode(ImageStore.from_images(images))
    streams = reference.encode_streams(images, 200.0)
    decoded = reference.decode_streams(streams)
    seen, nbytes, units = codec.decode(kept), codec.nbytes(kept).tolist(), codec.units(kept)
    assert isinstance(kept, ByteStore) and kept.sizes.tolist() == [list(size) for size in SIZES]
    for k, (body, one) in enumerate(zip(kept.strings(), streams, strict=True)):
        assert bytes(body) == one.pack_body()
        assert torch.equal(seen.image(k), decoded[k])
        assert nbytes[k] == 4 + len(one.payload) + 12
        assert float(units[k]) == pytest.approx((4 + len(one.payload)) / images[k].size, rel=1e-12)
    assert sum(nbytes) == kept.nbytes + 4 * len(images) and units.dtype == torch.float64
    assert codec.head == streams[0].head
    assert len({bytes(body) for body in kept.strings()}) > 3, "the model says something"


def test_images_from_anywhere_in_a_store(codec):
    images = pictures([(9, 12), (16, 7), (5, 5), (12, 12)])
    store = ImageStore.from_images(images)
    files = [bytes(body) for body in codec.encode(store).strings()]
    scattered = ImageStore(store.pixels, store.offsets[[3, 1, 1]], store.geometry[[3, 1, 1]])
    assert [bytes(b) for b in codec.encode(scattered).strings()] == [files[k] for k in (3, 1, 1)]
    packed = store.compress(torch.tensor([[0, 0, 3, 3]] * 4, dtype=torch.int16))
    assert torch.equal(codec.encode(packed).data, codec.encode(packed.reconstruct()).data)


def test_no_images(codec, checkpoint):
    kept = codec.encode(ImageStore.empty())
    assert len(kept) == len(codec.decode(kept)) == 0
    assert codec.units(kept).tolist() == codec.nbytes(kept).tolist() == []
    fresh = make_codec("learned")
    assert len(fresh.decode(ByteStore.empty())) == 0, "nothing to read needs no model"


def test_decoding_in_stretches_changes_nothing(codec, monkeypatch):
    kept = codec.encode(ImageStore.from_images(pictures()))
    whole = codec.decode(kept)
    monkeypatch.setattr(learned, "_STRETCH", 100)
    pieces = codec.decode(kept)
    assert torch.equal(whole.pixels, pieces.pixels) and torch.equal(whole.sizes, pieces.sizes)


@pytest.mark.parametrize(("precision", "each"), [("fp16", 2), ("fp32", 4)])
def test_what_reads_streams_is_counted(model, checkpoint, precision, each):
    codec = make_codec("learned", checkpoint=checkpoint, precision=precision)
    assert codec.retained() == [] and codec.state() == {}, "nothing is read before it is asked"
    codec.check(ImageStore.empty())
    (entry,) = codec.retained()
    read = {k: v for k, v in model.state_dict().items() if k.startswith(READS)}
    beside = len(json.dumps(model.structure())) + 16
    weights = [each if v.is_floating_point() else 4 for v in read.values()]
    held = sum(size * v.numel() for size, v in zip(weights, read.values(), strict=True))
    assert entry.nbytes == held + beside
    assert entry.kind == "codec" and Budget.parse("1MiB").counts(entry.kind)
    assert set(codec.state()) == {*model.state_dict(), "structure", "head"}
    assert set(codec.state()) > set(entry.buffers)
    free = make_codec("learned", checkpoint=checkpoint, count_codec=False)
    free.check(ImageStore.empty())
    (entry,) = free.retained()
    assert not Budget.parse("1MiB").counts(entry.kind)
    assert Budget.parse("1MiB, count=all").counts(entry.kind)


def test_networks_are_working_memory(checkpoint):
    memory = Memory("9 images", make_codec("learned", checkpoint=checkpoint))
    (task,) = stream(0, (2,))
    assert memory.working_nbytes == 0
    memory.update(task, embed)
    networks = memory.working_nbytes
    assert networks >= 4 * sum(v.numel() for v in memory.codec.state().values()) // 2
    pixels = 3 * int(memory.examples().images.sizes.prod(1).sum()) + 24 * len(memory)
    assert memory.working_nbytes == networks + pixels
    before = memory.examples().images.pixels
    memory.release()
    assert memory.working_nbytes == 0
    assert torch.equal(memory.examples().images.pixels, before)


BUDGETS = ["3 images", "1 images/class", "38000 B", "20000 B/class", "unlimited", "none"]


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.filterwarnings("ignore:memory is")
def test_a_memory_keeps_to_its_budget_with_the_weights(checkpoint, text):
    selection = "random" if text == "3 images" else "herding"
    memory = Memory(text, make_codec("learned", checkpoint=checkpoint), selection)
    budget = Budget.parse(text)
    for task in stream(0, (2, 1)):
        check_codec(memory, task.examples.images)
        weights = sum(entry.nbytes for entry in codec_overhead(memory))
        memory.update(task, embed, seed=task.index, other_nbytes=weights)
        held = buffers_nbytes(memory)
        assert memory.nbytes == held == int(memory.exemplar_nbytes().sum())
        assert (weights > 0) == (text != "none")
        total = held + weights if budget.unit == "bytes" else memory.units
        assert total <= budget.limit(task.total) + 1e-6
        if text not in ("unlimited", "none"):
            assert len(memory) >= task.total


def test_weights_that_fill_the_budget_are_refused_before_training(checkpoint):
    images = ImageStore.from_images(pictures())
    memory = Memory("5kB", make_codec("learned", checkpoint=checkpoint))
    with pytest.raises(FastcilError, match=r"keeps [0-9]+ bytes beside exemplars; pass at least"):
        check_codec(memory, images)
    for text in ("5kB/class", "2 images", "none"):
        check_codec(Memory(text, make_codec("learned", checkpoint=checkpoint)), images)
    check_codec(Memory("none", make_codec("learned")), images)
    check_codec(Memory("5kB", make_codec("learned"), keeps="nothing"), images)


def test_a_saved_memory_needs_no_checkpoint(checkpoint, tmp_path):
    task, later = stream(1, (2, 1))
    memory = Memory("3 images", make_codec("learned", checkpoint=checkpoint, lmbda=64.0))
    memory.update(task, embed)
    gone = make_codec("learned", checkpoint=str(tmp_path / "gone.safetensors"))
    gone.restore({name: value.clone() for name, value in memory.codec.state().items()})
    twin = Memory("3 images", gone)
    twin.restore({name: value.clone() for name, value in memory.state().items()})
    assert torch.equal(twin.examples().images.pixels, memory.examples().images.pixels)
    for one in (memory, twin):
        one.update(later, embed)
    assert twin.checksum() == memory.checksum() and gone.lmbda == 64.0
    assert set(twin.codec.state()) == set(memory.codec.state())


def first(names, start):
    return next(name for name in names if name.startswith(start))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda state: state.pop("head"), "has no 'head'"),
        (lambda state: state.pop("structure"), "has no 'structure'"),
        (lambda state: state["structure"].zero_(), "weights can't be used"),
        (lambda state: state.pop(first(state, "decoder.")), r'"decoder\.'),
        (lambda state: state[first(state, "entropy.")].add_(1), "another entropy model"),
    ],
)
def test_a_damaged_state_is_a_sentence(codec, damage, says):
    images = ImageStore.from_images(pictures())
    kept = codec.encode(images)
    state = {name: value.clone() for name, value in codec.state().items()}
    damage(state)
    with pytest.raises(FastcilError, match=says) as caught:
        codec.restore(state)
    assert "\n" not in str(caught.value)
    assert torch.equal(codec.encode(images).data, kept.data), "it is as it was"


def swap(memory, checkpoint, **options):
    memory.use(make_codec("learned", checkpoint=checkpoint, **options))


def test_the_latest_decoder_reads_old_streams(model, checkpoint, tmp_path):
    task, later = stream(2, (2, 1))
    memory = Memory("3 images", make_codec("learned", checkpoint=checkpoint))
    memory.update(task, embed)
    held, before = memory.checksum(), memory.examples().images.pixels
    swap(memory, fine_tuned(model, tmp_path / "new.safetensors"))
    after = memory.examples().images.pixels
    assert memory.checksum() == held and not torch.equal(before, after)
    new = make_codec("learned", checkpoint=str(tmp_path / "new.safetensors"))
    new.check(ImageStore.empty())
    assert torch.equal(new.decode(ByteStore.from_state(memory.state())).pixels, after)
    memory.update(later, embed)
    assert len(memory.examples()) == len(memory)


def test_a_pinned_decoder_stays(model, checkpoint, tmp_path):
    (task,) = stream(2, (2,))
    memory = Memory("3 images", make_codec("learned", checkpoint=checkpoint, decoder="pinned"))
    memory.update(task, embed)
    before, old = memory.examples().images.pixels, memory.codec.state()
    swap(memory, fine_tuned(model, tmp_path / "new.safetensors"), decoder="pinned")
    assert torch.equal(memory.examples().images.pixels, before)
    new = memory.codec.state()
    for name, value in old.items():
        assert torch.equal(value, new[name]) or name.startswith("encoder."), name
    assert not torch.equal(*(state[first(old, "encoder.")] for state in (old, new)))


def test_pinned_pixels_depend_on_nothing_beside_them(checkpoint):
    codec = make_codec("learned", checkpoint=checkpoint, decoder="pinned")
    kept = codec.encode(ImageStore.from_images(pictures()))
    whole, threads = codec.decode(kept), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = [codec.decode(kept.select([k])).image(0) for k in range(len(kept))]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(whole.image(k), image) for k, image in enumerate(alone))
    free = make_codec("learned", checkpoint=checkpoint)
    assert torch.equal(free.encode(ImageStore.from_images(pictures())).data, kept.data)
    assert (free.decode(kept).pixels.int() - whole.pixels.int()).abs().amax() <= 1


def test_another_entropy_model(model, checkpoint, tmp_path):
    task, later = stream(3, (2, 1))
    memory = Memory("20 images", make_codec("learned", checkpoint=checkpoint))
    memory.update(task, embed)
    held, pixels = memory.checksum(), memory.examples().images.pixels
    other = fine_tuned(model, tmp_path / "other.safetensors", "entropy")
    with pytest.raises(FastcilError, match=r"entropy model [0-9a-f]{16} is not that of memory's"):
        swap(memory, other)
    with pytest.raises(FastcilError, match="has the same precision"):
        swap(memory, checkpoint, precision="fp32")
    with pytest.raises(FastcilError, match=r"lmbda is 64\.0, and memory's"):
        swap(memory, checkpoint, lmbda=64.0)
    assert memory.checksum() == held and torch.equal(memory.examples().images.pixels, pixels)
    count = len(memory)
    with pytest.warns(UserWarning, match=f"memory's {count} exemplars, .*they are dropped"):
        swap(memory, other, on_mismatch="drop", lmbda=64.0)
    assert len(memory) == len(memory.examples()) == 0
    memory.update(later, embed)
    assert memory.counts(3)[:2] == [0, 0] and memory.counts(3)[2] > 0
    with pytest.raises(FastcilError, match="codec 'jpeg', which codec 'learned' can't read"):
        files = Memory("90 images", "jpeg")
        files.update(task, embed)
        swap(files, checkpoint)


def test_nothing_is_given_up_for_a_stream_that_does_not_come_back(codec, monkeypatch):
    task, later = stream(4, (1, 1))
    memory = Memory("3 images", codec)
    memory.update(task, embed)
    held, encode = memory.checksum(), ImageCodec.encode_streams

    def lie(self, images, lmbda):
        streams = encode(self, images, lmbda)
        object.__setattr__(streams[-1], "check", streams[-1].check ^ 1)
        return streams

    monkeypatch.setattr(ImageCodec, "encode_streams", lie)
    for selection in ("random", "own"):
        memory.selection = selection
        with pytest.raises(FastcilError, match="an exemplar can't be kept as a stream"):
            everything = torch.arange(len(later.examples))
            Memory("unlimited", codec, selection).update(later, embed, chosen=everything)
        memory.selection = "herding"
    images = memory.examples().images
    with pytest.raises(FastcilError, match="an exemplar can't be kept as a stream"):
        memory.replace(torch.tensor([0]), images.select([0]), classes=1)
    assert memory.checksum() == held


def test_a_damaged_stream_is_a_sentence(codec):
    kept = codec.encode(ImageStore.from_images(pictures()))
    bad = ByteStore(kept.data.clone(), kept.lengths, kept.sizes)
    bad.data[0] ^= 1
    with pytest.raises(FastcilError, match="what memory holds can't be decoded by codec 'learned'"):
        codec.decode(bad)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lmbda": 0}, "lmbda is 0; it must be a positive number"),
        ({"lmbda": float("inf")}, "lmbda is inf"),
        ({"lmbda": True}, "lmbda is True"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of fp16, fp32"),
        ({"decoder": "old"}, "decoder is 'old'; it must be one of latest, pinned"),
        ({"on_mismatch": "keep"}, "on_mismatch is 'keep'"),
        ({"max_pixels": 1.5}, "max_pixels is 1.5"),
        ({"lambda": 5}, "did you mean 'lmbda'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(FastcilError, match=says):
        make_codec("learned", **options)


def test_what_can_t_be_coded_is_told_before_training(checkpoint, tmp_path):
    images = ImageStore.from_images(pictures())

    def refused(says, **options):
        with pytest.raises(FastcilError, match=says):
            make_codec("learned", **{"checkpoint": checkpoint, **options}).check(images)

    refused("needs a trained model; train one by 'fastcil codec train'", checkpoint=None)
    refused("gone.safetensors", checkpoint=str(tmp_path / "gone.safetensors"))
    refused("lmbda is 2000, and the checkpoint .* was trained for 32 to 1024", lmbda=2000)
    refused("an image has 64 x 64 pixels, and codec 'learned' takes up to 4000", max_pixels=4000)


def test_weights_beyond_half_precision_are_told(model, tmp_path):
    other = build_model(model.structure())
    with torch.no_grad():
        dict(other.named_parameters())[first(other.state_dict(), "decoder.")].fill_(1e5)
    save_codec(tmp_path / "large.safetensors", other)
    codec = make_codec("learned", checkpoint=str(tmp_path / "large.safetensors"))
    with pytest.raises(FastcilError, match=r"'fp16', in which 'decoder\..* use fp32"):
        codec.check(ImageStore.empty())


def test_a_run_s_random_draws_do_not_depend_on_it(codec):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    codec.decode(codec.encode(ImageStore.from_images(pictures())))
    codec.release()
    codec.restore(codec.state())
    assert torch.equal(torch.rand(3), wanted)


def test_classes_that_come_again(checkpoint):
    rng = np.random.default_rng(7)
    memory = Memory("2 images", make_codec("learned", checkpoint=checkpoint))
    for index in range(2):
        examples = draw(rng, [0] * 3 + [1] * 3)
        task = Task(index, (0, 1), 2 * index, examples, examples.select([]))
        memory.update(task, embed)
    assert min(memory.counts(2)) > 1
