"""Zero-shot heads from class names, their cache, published heads, and the names of the 20 tasks."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, normalize

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.suites.class_names import clip_task, clip_task_names, read_class_names
from adaptive_merge.weights import read_head
from adaptive_merge.weights.zero_shot import head_fingerprint, zero_shot_head
from weights.checkpoint_helpers import ClassificationHead, build_clip, write

CLASSES = {
    **{"SUN397": 397, "Cars": 196, "RESISC45": 45, "EuroSAT": 10, "SVHN": 10, "GTSRB": 43, "MNIST": 10, "DTD": 47},
    **{"PCAM": 2, "CIFAR100": 100, "STL10": 10, "OxfordIIITPet": 37, "Flowers102": 102, "FER2013": 7},
    **{"CIFAR10": 10, "Food101": 101, "RenderedSST2": 2, "EMNIST": 10, "FashionMNIST": 10, "KMNIST": 10},
}
TEMPLATES = {"SUN397": 2, "Cars": 8, "RESISC45": 18, "EuroSAT": 3, "SVHN": 1, "GTSRB": 3, "MNIST": 1, "DTD": 8}
NAMES, PROMPTS = ["cat", "big dog", "bird"], ["a photo of a {}.", "the {}"]


class Letters:
    """A tokenizer that fits the tiny text tower; counts what it is asked."""

    def __init__(self):
        self.texts = 0

    def __call__(self, texts):
        self.texts += len(texts)
        rows = [[1, *(2 + ord(letter) % 60 for letter in text[:14]), 63] for text in texts]
        return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


def test_a_head_is_the_normalised_mean_of_normalised_prompts_times_the_scale(clip):
    head = zero_shot_head(clip, Letters(), NAMES, PROMPTS, batch_size=4)
    for row, name in zip(head, NAMES):
        with torch.no_grad():
            embedded = torch.cat([clip.encode_text(Letters()([prompt.format(name)])) for prompt in PROMPTS])
        mean = normalize(normalize(embedded, dim=-1).mean(0), dim=0)
        torch.testing.assert_close(row, clip.logit_scale.exp().item() * mean, rtol=1e-5, atol=1e-5)
    assert head.shape == (3, 24)
    assert not head.requires_grad


def test_logits_are_scaled_cosines(clip):
    head = zero_shot_head(clip, Letters(), NAMES, PROMPTS)
    feature = torch.randn(24, generator=torch.Generator().manual_seed(0))
    expected = clip.logit_scale.exp().item() * cosine_similarity(feature[None], head)
    torch.testing.assert_close(head @ normalize(feature, dim=0), expected, rtol=1e-4, atol=1e-4)
    assert math.isclose(head[0].norm().item(), clip.logit_scale.exp().item(), rel_tol=1e-4)


def test_a_class_name_may_hold_braces(clip):
    assert zero_shot_head(clip, Letters(), ["{}", "{0}"], ["a {}"]).isfinite().all()


def test_the_mode_of_the_model_is_left_as_it_was(clip):
    clip.train()
    zero_shot_head(clip, Letters(), NAMES, PROMPTS)
    assert clip.training


def test_a_cached_head_is_the_same_and_costs_no_text(tmp_path, clip):
    tokenizer = Letters()
    first = zero_shot_head(clip, tokenizer, NAMES, PROMPTS, backbone="tiny", cache=tmp_path / "heads")
    asked = tokenizer.texts
    again = zero_shot_head(clip, tokenizer, NAMES, PROMPTS, backbone="tiny", cache=tmp_path / "heads")
    assert tokenizer.texts == asked == 6
    assert torch.equal(first, again)
    assert [path.name.count(".partial") for path in (tmp_path / "heads").iterdir()] == [0]


def test_a_damaged_cache_is_noticed_and_replaced(tmp_path, clip, caplog):
    first = zero_shot_head(clip, Letters(), NAMES, PROMPTS, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert torch.equal(zero_shot_head(clip, Letters(), NAMES, PROMPTS, cache=tmp_path), first)
    assert "its digest does not fit" in caplog.text
    caplog.clear()
    assert torch.equal(zero_shot_head(clip, Letters(), NAMES, PROMPTS, cache=tmp_path), first)
    assert caplog.text == ""


def test_the_fingerprint_depends_on_everything_a_head_depends_on(clip):
    def with_changed(name):
        model = build_clip()
        with torch.no_grad():
            model.get_parameter(name).add_(1e-3)
        return head_fingerprint(model, NAMES, PROMPTS, "tiny")

    base = head_fingerprint(clip, NAMES, PROMPTS, "tiny")
    others = [
        head_fingerprint(clip, NAMES[::-1], PROMPTS, "tiny"),
        head_fingerprint(clip, NAMES, PROMPTS[:1], "tiny"),
        head_fingerprint(clip, NAMES, PROMPTS, "other"),
        with_changed("token_embedding.weight"),
        with_changed("logit_scale"),
        with_changed("transformer.resblocks.0.mlp.c_fc.weight"),
    ]
    assert len({base, *others}) == 7
    assert base == with_changed("visual.proj") == head_fingerprint(build_clip(), NAMES, PROMPTS, "tiny")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], PROMPTS, "class_names: expected a list with at least one name"),
        ("cat", PROMPTS, "class_names"),
        (NAMES, [], "templates: expected a list"),
        (NAMES, ["a photo"], "template 'a photo': expected one {}"),
        (["cat", "cat"], PROMPTS, "'cat' is given twice"),
    ],
)
def test_lists_that_make_no_head_are_refused(clip, names, templates, message):
    with pytest.raises(InputError, match=message):
        zero_shot_head(clip, Letters(), names, templates)


def published(bias=None, *, normalize_input=True):
    head = ClassificationHead(24, 5)
    head.normalize = normalize_input
    with torch.no_grad():
        head.bias.zero_() if bias is None else head.bias.copy_(bias)
    return head


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle-2"])
def test_published_heads_are_read_bit_for_bit(tmp_path, strangers, kind):
    head = published()
    path = write(head, tmp_path / "head_MNIST.pt", kind)
    assert torch.equal(read_head(path), head.weight.detach())


def test_heads_as_state_dict_and_safetensors(tmp_path):
    weight = torch.randn(5, 24)
    write({"weight": weight, "bias": torch.zeros(5)}, tmp_path / "head.pt", "zip")
    save_file({"weight": weight}, tmp_path / "head.safetensors")
    assert torch.equal(read_head(tmp_path / "head.pt"), weight)
    assert torch.equal(read_head(tmp_path / "head.safetensors"), weight)


def test_heads_that_are_something_else_are_refused(tmp_path, strangers):
    cases = {
        "bias": (published(torch.full((5,), 0.5)), "`bias`: expected zeros .* values up to 0.5"),
        "scale": (published(normalize_input=False), "does not normalise its input"),
        "nan": ({"weight": torch.full((2, 3), torch.nan)}, "`weight`: 6 of 6 numbers are NaN"),
        "flat": ({"weight": torch.zeros(3)}, r"expected \[classes, width\], found \(3,\)"),
        "two": ({"a.weight": torch.zeros(1, 1), "b.weight": torch.zeros(1, 1)}, "expected one tensor `weight`"),
    }
    for name, (root, message) in cases.items():
        path = write(root, tmp_path / f"{name}.pt", "zip")
        with pytest.raises(InputError, match=message):
            read_head(path)
    with pytest.raises(MissingFileError, match="expected a classification head"):
        read_head(tmp_path / "none.pt")


def test_the_published_tasks_have_their_class_and_template_counts():
    assert {name: len(clip_task(name).classes) for name in clip_task_names()} == CLASSES
    assert {name: len(clip_task(name).templates) for name in TEMPLATES} == TEMPLATES
    for name in clip_task_names():
        task = clip_task(name)
        assert len(set(task.classes)) == len(task.classes)
        assert all(template.count("{}") == 1 for template in task.templates)


def test_class_names_agree_with_torchvision_where_it_knows_them():
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    assert list(clip_task("FashionMNIST").classes) == datasets.FashionMNIST.classes
    assert list(clip_task("KMNIST").classes) == datasets.KMNIST.classes
    assert list(clip_task("EMNIST").classes) == datasets.EMNIST.classes_split_dict["digits"]


def test_label_orders_that_follow_from_sorted_folders():
    for name in ("SUN397", "DTD", "RESISC45", "Food101", "CIFAR100"):
        folders = [label.replace(" ", "_") for label in clip_task(name).classes]
        assert folders == sorted(folders)


def test_an_unknown_task_suggests_a_known_one():
    with pytest.raises(InputError, match="'mnist'.*did you mean 'MNIST'|'mnist'.*Known: SUN397"):
        clip_task("mnist")


def test_class_names_of_the_user(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\n big dog \nñandú\n\n", encoding="utf-8")
    assert read_class_names(path) == ("cat", "big dog", "ñandú")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog", "line 2 is empty"),
        (b"cat\ndog\ncat", "line 3: 'cat' again, first in line 1"),
        (b"\n\n", "no class names"),
        (b"\xff\xfe\x00", "not readable as UTF-8"),
    ],
)
def test_class_lists_that_cannot_be_meant_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_class_names(tmp_path / "classes.txt")


def test_a_missing_class_list_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="none.txt"):
        read_class_names(tmp_path / "none.txt")
