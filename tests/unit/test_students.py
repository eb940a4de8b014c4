from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from diffusers import UNet2DConditionModel  # noqa: E402

from benchmarks.emoji.grow import grow  # noqa: E402
from sdlite import settings  # noqa: E402
from sdlite.distill.students import (  # noqa: E402
    PRESETS,
    StudentSpec,
    block_names,
    build,
    parameters,
    shape,
    slice_width,
)
from sdlite.errors import InputError  # noqa: E402

CROSS, PLAIN, UP_CROSS, UP = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
)


def small(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "down_block_types": (CROSS, CROSS, CROSS),
        "up_block_types": (UP_CROSS, UP_CROSS, UP_CROSS),
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def run(unet):
    g = torch.Generator().manual_seed(3)
    x, h = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    with torch.no_grad():
        return unet(x, torch.tensor([7, 900]), h).sample


def test_nothing_removed_is_bit_equal():
    teacher = small()
    assert torch.equal(run(build(teacher, StudentSpec())), run(teacher))


@pytest.mark.parametrize(
    ("preset", "want"),
    [("bk-base", 579_384_964), ("bk-small", 482_346_884), ("bk-tiny", 323_384_964)],
)
def test_bk_presets_have_the_published_parameters(preset, want):
    """From SD-1.4's own config, on the meta device: no memory, real shapes."""
    with torch.device("meta"):
        teacher = sd14()
        assert parameters(teacher) == 859_520_964
        assert parameters(build(teacher, PRESETS[preset])) == want


def test_block_removal_copies_first_and_last_up_layer():
    teacher = small()
    student = build(teacher, PRESETS["bk-tiny"])
    a, b = student.state_dict(), teacher.state_dict()
    assert torch.equal(
        a["up_blocks.0.resnets.1.conv1.weight"], b["up_blocks.1.resnets.2.conv1.weight"]
    )
    assert torch.equal(
        a["down_blocks.1.resnets.0.conv1.weight"], b["down_blocks.1.resnets.0.conv1.weight"]
    )
    assert student.mid_block is None
    assert run(student).isfinite().all()


# Nota-NetsPresso/BK-SDM, copy_weight_from_teacher: student name -> teacher name, of SD-1.4's four
# stages
BK_NAMES = {
    "bk-base": {
        "down_blocks.3.resnets.0.conv1.weight": "down_blocks.3.resnets.0.conv1.weight",
        "mid_block.resnets.1.conv1.weight": "mid_block.resnets.1.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight": "up_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.resnets.1.conv1.weight": "up_blocks.0.resnets.2.conv1.weight",
        "up_blocks.3.attentions.1.proj_in.weight": "up_blocks.3.attentions.2.proj_in.weight",
        "up_blocks.2.upsamplers.0.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    },
    "bk-tiny": {
        "down_blocks.2.attentions.0.proj_in.weight": "down_blocks.2.attentions.0.proj_in.weight",
        "up_blocks.0.resnets.0.conv1.weight": "up_blocks.1.resnets.0.conv1.weight",
        "up_blocks.0.resnets.1.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",
        "up_blocks.2.attentions.1.norm.bias": "up_blocks.3.attentions.2.norm.bias",
        "up_blocks.1.upsamplers.0.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    },
}


@pytest.mark.parametrize("preset", BK_NAMES)
def test_block_map_is_bk_sdms(preset):
    rename = block_names(PRESETS[preset])
    assert {k: rename(k) for k in BK_NAMES[preset]} == BK_NAMES[preset]


def sd14():
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=(UP, UP_CROSS, UP_CROSS, UP_CROSS),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "want"), [("w0.62", 340_352_604), ("extreme-120m", 123_234_244)]
)
def test_width_presets_from_sd14(preset, want):
    """Real weights (random) of 860M parameters: half a minute and 6 GB."""
    student = build(sd14(), PRESETS[preset])
    assert parameters(student) == want
    with torch.no_grad():
        assert (
            student(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, 768)).sample.isfinite().all()
        )


def test_whole_norm_groups_go_where_equal_counts_do_not_divide():
    teacher = small(block_out_channels=(40, 80, 80), norm_num_groups=8, attention_head_dim=8)
    student = build(teacher, StudentSpec(width=0.625))
    assert student.config.norm_num_groups == 5
    assert student.config.block_out_channels == (25, 50, 50)
    assert student.config.attention_head_dim == (5, 5, 5)
    assert run(student).isfinite().all()
    from sdlite.distill.students import _Plan

    plan = _Plan(teacher, (40, 80, 80), (8, 8, 8), 8, 0.625)
    for keep, channels in zip(plan.stream, (40, 80, 80), strict=True):
        assert (
            sorted(torch.bincount(keep // (channels // 8), minlength=8).tolist())
            == [0, 0, 0] + [channels // 8] * 5
        )


def test_half_width_halves_channels_and_heads_and_runs():
    teacher = small()
    student = build(teacher, StudentSpec(width=0.5))
    assert student.config.block_out_channels == (8, 16, 16)
    assert student.config.attention_head_dim == (2, 2, 2)
    assert run(student).isfinite().all()


def test_slicing_equals_the_teacher_whose_dropped_channels_do_nothing():
    """Zero what is dropped in one resnet's way: the sliced convolution gives the teacher's kept
    outputs exactly.
    """
    from sdlite.distill.students import _Plan

    teacher = small()
    plan = _Plan(teacher, (16, 32, 32), (4, 4, 4), 4, 0.5)
    student = slice_width(teacher, 0.5)
    name = "down_blocks.1.resnets.1.conv1"
    wide, thin = teacher.get_submodule(name), student.get_submodule(name)
    keep = plan.stream[1]
    x = torch.zeros(1, 32, 4, 4)
    x[:, keep] = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(thin(x[:, keep]), wide(x)[:, keep], rtol=1e-5, atol=1e-6)
    wrong = torch.roll(keep, 1)
    assert (thin(x[:, wrong]) - wide(x)[:, keep]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attentions.0.transformer_blocks.0.attn1.to_q", (1, 3, 32)),
        ("attentions.0.proj_in", (1, 32, 4, 4)),
    ],
)
def test_slicing_a_linear_layer_equals_the_teacher_whose_dropped_channels_do_nothing(name, shape):
    from sdlite.distill.students import _Plan

    teacher, stage = small(), 1
    plan, student = _Plan(teacher, (16, 32, 32), (4, 4, 4), 4, 0.5), slice_width(small(), 0.5)
    wide, thin = (net.get_submodule(f"down_blocks.{stage}.{name}") for net in (teacher, student))
    keep, rows = plan.stream[stage], plan._rows(f"down_blocks.{stage}.{name}.weight", wide.weight)
    dim = 2 if len(shape) == 3 else 1
    few = torch.randn([16 if i == dim else n for i, n in enumerate(shape)])
    x = torch.zeros(shape).index_copy(dim, keep, few)
    torch.testing.assert_close(thin(few), wide(x).index_select(dim, rows), rtol=1e-5, atol=1e-6)
    assert (thin(few.roll(1, dim)) - wide(x).index_select(dim, rows)).abs().max() > 1e-3


def test_slicing_whole_norm_groups_equals_the_teachers_norm_on_what_is_kept():
    """The statistics of a group do not see other groups: exact whatever the dropped channels
    hold.
    """
    from sdlite.distill.students import _Plan

    teacher = small(block_out_channels=(40, 80, 80), norm_num_groups=8, attention_head_dim=8)
    plan, student = _Plan(teacher, (40, 80, 80), (8, 8, 8), 8, 0.625), slice_width(teacher, 0.625)
    wide, thin = (net.down_blocks[1].resnets[0].norm2 for net in (teacher, student))
    keep, x = plan.stream[1], torch.randn(2, 80, 4, 4)
    torch.testing.assert_close(thin(x[:, keep]), wide(x)[:, keep], rtol=1e-5, atol=1e-6)
    assert (thin(x[:, keep.roll(3)]) - wide(x)[:, keep]).abs().max() > 1e-2


def test_kept_channels_are_equal_in_every_norm_group():
    from sdlite.distill.students import _Plan

    plan = _Plan(small(), (16, 32, 32), (4, 4, 4), 4, 0.5)
    for keep, channels in zip(plan.stream, (16, 32, 32), strict=True):
        assert torch.bincount(keep // (channels // 4)).tolist() == [channels // 8] * 4


@pytest.mark.parametrize("preset", ["bk-base", "bk-tiny", "half"])
def test_shape_on_the_meta_device_is_that_of_the_student(preset):
    teacher = small()
    one, other = shape(teacher, PRESETS[preset]), build(teacher, PRESETS[preset])
    assert {k: tuple(v.shape) for k, v in one.state_dict().items()} == {
        k: tuple(v.shape) for k, v in other.state_dict().items()
    }
    assert next(one.parameters()).device.type == "meta"


@pytest.mark.parametrize(
    ("teacher", "spec", "text"),
    [
        ({}, StudentSpec(width=0.3), "do not divide"),
        ({"layers_per_block": 1}, PRESETS["bk-base"], "layers_per_block=1"),
        ({"block_out_channels": (16, 32, 64)}, PRESETS["bk-tiny"], "one width"),
        ({}, StudentSpec(drop_inner=True), "drop_mid"),
    ],
)
def test_students_that_cannot_be_built_say_why(teacher, spec, text):
    with pytest.raises(InputError, match=text):
        build(small(**teacher), spec)


@pytest.mark.parametrize("one_layer", [False, True])
def test_grown_network_computes_the_same(one_layer):
    large = small(block_out_channels=(32, 64, 64), attention_head_dim=8)
    spec = StudentSpec(one_layer=one_layer, width=0.5)
    student = build(large, spec).eval()
    grown = grow(student, dict(large.config), one_layer=one_layer).eval()
    assert parameters(grown) == parameters(large)
    assert (run(grown) - run(student)).abs().max() < 1e-5
    copies = grown.state_dict()["down_blocks.0.resnets.0.conv1.weight"]
    assert not torch.equal(
        copies[:, 0::2], copies[:, 1::2]
    )  # unequal halves learn different things


def test_grown_network_with_a_wrong_split_differs(monkeypatch):
    large = small(block_out_channels=(32, 64, 64), attention_head_dim=8)
    student = build(large, StudentSpec(width=0.5)).eval()
    monkeypatch.setattr(
        "benchmarks.emoji.grow._Spread._head", lambda self, name: 1
    )  # heads torn apart
    assert (run(grow(student, dict(large.config)).eval()) - run(student)).abs().max() > 1e-3


def test_grow_refuses_widths_that_are_not_one_multiple():
    with pytest.raises(InputError, match=r"same whole multiple"):
        grow(small(), {**small().config, "block_out_channels": (32, 64, 80)})


def test_taylor_keeps_the_channels_that_the_loss_misses_not_the_largest():
    from sdlite.distill.students import _Plan

    teacher = small()
    gradients = {k: torch.zeros_like(p) for k, p in teacher.named_parameters()}
    wanted = torch.arange(
        0,
        32,
        2,
        # two of each norm group of eight would be odd ones by size: make them large, and their
        # gradients nothing
    )
    with torch.no_grad():
        for name, w in teacher.named_parameters():
            if (
                w.ndim >= 2
                and w.shape[0] == 32
                and (
                    "conv2" in name
                    or "proj_out" in name
                    or "samplers" in name
                    or "conv_shortcut" in name
                )
            ):
                w[1::2] *= 10
                gradients[name][wanted] = 1.0
    small_plan, taylor = (
        _Plan(teacher, (16, 32, 32), (4, 4, 4), 4, 0.5, g) for g in (None, gradients)
    )
    assert small_plan.stream[1].tolist() == (wanted + 1).tolist()
    assert taylor.stream[1].tolist() == wanted.tolist()
    student = build(teacher, StudentSpec(width=0.5, score="taylor"), gradients)
    assert run(student).isfinite().all()
    assert not torch.equal(run(student), run(build(teacher, StudentSpec(width=0.5))))
    with pytest.raises(InputError, match="teacher_gradients"):
        build(teacher, StudentSpec(width=0.5, score="taylor"))
    with pytest.raises(InputError, match="accepted: 'l1' or 'taylor'"):
        StudentSpec(score="size")


def test_random_weights_keep_the_shape_alone():
    teacher = small()
    kept, new = (
        build(teacher, StudentSpec(one_layer=True)),
        build(teacher, StudentSpec(one_layer=True, weights="random")),
    )
    assert dict(kept.config) == dict(new.config)
    assert not torch.equal(kept.conv_in.weight, new.conv_in.weight)


def test_features_of_bk_tiny_are_compared_before_the_halving_that_it_has_lost():
    from sdlite.distill.features import block_taps, matched_taps, tap_channels

    torch.manual_seed(0)
    teacher = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    for name in ("bk-base", "bk-tiny"):
        student = build(teacher, PRESETS[name])
        mine, theirs = matched_taps(student, teacher)
        channels = tap_channels(student, teacher, mine, theirs)
        assert set(channels) == set(block_taps(student)), name
        assert all(a == b for a, b in channels.values())
    assert (mine["down2"], theirs["down2"]) == (
        "down_blocks.2.attentions.0",
        "down_blocks.2.attentions.1",
    )
    with pytest.raises(InputError, match=r"down2.*different resolutions"):
        tap_channels(student, teacher, {"down2": "down_blocks.2"}, {"down2": "down_blocks.2"})


# --- conditions

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (UP_CROSS, UP_CROSS, UP),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Parameters of the published UNets: SDXL base, segmind/SSD-1B, segmind/Segmind-Vega, and
# etri-vilab's koala-1b and koala-700m (1,161M and 782M in arXiv:2312.04005).
PUBLISHED = {
    "": 2_567_463_684,
    "ssd-1b": 1_331_334_404,
    "vega": 745_225_604,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_students_of_sdxl_have_the_published_parameters(preset):
    with torch.device("meta"):
        teacher = UNet2DConditionModel(sample_size=128, cross_attention_dim=2048, **XL)
    spec = PRESETS[preset] if preset else StudentSpec()
    assert parameters(shape(teacher, spec)) == PUBLISHED[preset]


def conditioned(kind, **changes):
    """A small teacher with such an embedding, and what it is called with besides."""
    torch.manual_seed(1)
    config, given = {
        "guidance": ({"time_cond_proj_dim": 6}, {"timestep_cond": torch.randn(2, 6)}),
        "text-time": (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 29,
            },
            {
                "added_cond_kwargs": {
                    "text_embeds": torch.randn(2, 5),
                    "time_ids": torch.randint(0, 9, (2, 6)),
                }
            },
        ),
        "classes": ({"num_class_embeds": 3}, {"class_labels": torch.tensor([2, 0])}),
        "noise-level": ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([2, 50])}),
        "projection": (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
            {"class_labels": torch.randn(2, 7)},
        ),
        "simple": (
            {
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 7,
                "class_embeddings_concat": True,
                "time_embedding_dim": 48,
            },
            {"class_labels": torch.randn(2, 7)},
        ),
    }[kind]
    return small(**{**config, **changes}), given


CONDITIONS = ["guidance", "text-time", "classes", "noise-level", "projection", "simple"]


def run_with(unet, given, t=(7, 900)):
    g = torch.Generator().manual_seed(3)
    x, h = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    with torch.no_grad():
        return unet(x, torch.tensor(t), h, **given).sample


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_student_of_width_1_of_a_conditioned_teacher_is_bit_equal(kind):
    teacher, given = conditioned(kind)
    out = run_with(build(teacher, StudentSpec()), given)
    assert torch.equal(out, run_with(teacher, given))
    other = {k: v for k, v in given.items() if k != "timestep_cond"}
    if kind == "guidance":
        assert not torch.equal(out, run_with(teacher, other))


@pytest.mark.parametrize("width", [0.5, 0.75])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_narrower_students_of_conditioned_teachers_run_and_listen(kind, width):
    teacher, given = conditioned(kind)
    student = build(teacher, StudentSpec(one_layer=True, width=width))
    out = run_with(student, given)
    assert out.isfinite().all()
    inner = given.get("added_cond_kwargs", given)
    name = next(iter(inner))
    changed = {**inner, name: inner[name].flip(0)}
    changed = {"added_cond_kwargs": changed} if "added_cond_kwargs" in given else changed
    assert not torch.equal(out, run_with(student, changed))
    dim = student.config.time_embedding_dim or 4 * student.config.block_out_channels[0]
    assert dim == width * (teacher.config.time_embedding_dim or 64)
    one, other = shape(teacher, StudentSpec(one_layer=True, width=width)), student.state_dict()
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: other[k].shape for k in other}


def embedding(unet, given):
    """What a UNet's blocks are told: the sum of its embeddings (B, T)."""
    seen = []
    hook = unet.down_blocks[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k["temb"]), with_kwargs=True
    )
    run_with(unet, given, t=(0, 0))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", CONDITIONS)
def test_sliced_embeddings_equal_the_teachers_whose_dropped_channels_do_nothing(kind):
    """Neighboring frequencies weigh the same and the dropped hidden channels are not read: then
    the student's embedding is the teacher's on the channels that it keeps.
    """
    teacher, given = conditioned(kind)
    if kind == "noise-level":  # the sinusoids of 0 are as many zeros and ones at every width
        given = {"class_labels": torch.zeros(2)}
    kept = torch.arange(0, teacher.time_embedding.linear_1.out_features, 2)
    with torch.no_grad():
        for name in ("time_embedding", "class_embedding", "add_embedding"):
            module = getattr(teacher, name, None)
            if (second := getattr(module, "linear_2", None)) is not None:
                second.weight[:, kept + 1] = 0
        if (first := getattr(teacher.time_embedding, "cond_proj", None)) is not None:
            first.weight[1::2] = first.weight[::2]
    student = build(teacher, StudentSpec(width=0.5))
    whole, thin = embedding(teacher, given), embedding(student, given)
    columns = torch.cat([kept, kept + 48]) if kind == "simple" else kept
    assert (thin - whole[:, columns]).abs().max() < 1e-5
    assert (thin - whole[:, columns.roll(1)]).abs().max() > 1e-2


def test_transformer_layers_in_a_recipe():
    read = lambda said: settings.read(StudentSpec, said, "[student]")  # noqa: E731
    spec = read({"transformer_layers_per_block": [1, [1, 2]]})
    assert spec.transformer_layers_per_block == (1, (1, 2))
    for said, words in (
        ([1, "2"], r"\[student\]: transformer_layers_per_block.1.*'2'; accepted: a whole number"),
        ([-1], "at least 0"),
        (2, "transformer_layers_per_block=2; accepted: a list"),
    ):
        with pytest.raises(InputError, match=words):
            read({"transformer_layers_per_block": said})


def test_transformers_keep_their_first_blocks():
    teacher = small(transformer_layers_per_block=(1, 2, 4), use_linear_projection=True)
    spec = StudentSpec(
        drop_mid_attention=True,
        transformer_layers_per_block=(1, 1, (2, 3)),
        reverse_transformer_layers_per_block=((4, 1, 2), 2, 1),
    )
    student = build(teacher, spec)
    assert [len(a.transformer_blocks) for a in student.up_blocks[0].attentions] == [4, 1, 2]
    assert [len(a.transformer_blocks) for a in student.down_blocks[2].attentions] == [2, 3]
    assert len(student.mid_block.resnets) == 1
    a, b = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert run(student).isfinite().all()
    again = build(student, StudentSpec(one_layer=True, width=0.5))
    assert [len(a.transformer_blocks) for a in again.up_blocks[0].attentions] == [4, 2]
    assert run(again).isfinite().all()


@pytest.mark.parametrize(
    ("teacher", "spec", "text"),
    [
        (
            {},
            StudentSpec(transformer_layers_per_block=(1, 1)),
            r"transformer_layers_per_block=\[1, 1\] does not fit; accepted: a list of 3 stages",
        ),
        (
            {},
            StudentSpec(transformer_layers_per_block=(1, 1, (1,))),
            "reverse_transformer_layers_per_block=not given; accepted: both",
        ),
        (
            {},
            StudentSpec(
                transformer_layers_per_block=(1, 1, (1,)),
                reverse_transformer_layers_per_block=(1, 1, 1),
            ),
            r"a list of as many as it has layers, here \[2, 2, 2\]",
        ),
        (
            {},
            StudentSpec(transformer_layers_per_block=(1, 1, 2)),
            r"keep down_blocks.2.attentions.0.transformer_blocks.1.* does not have",
        ),
        ({"mid_block_type": None}, StudentSpec(drop_mid_attention=True), "keep mid_block.resnets"),
        ({}, StudentSpec(drop_mid=True, drop_mid_attention=True), "say one of them"),
        (
            {"class_embed_type": "identity"},
            StudentSpec(width=0.5),
            "class_embed_type='identity'; accepted: None, 'timestep'",
        ),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            StudentSpec(width=0.5),
            "cannot slice a UNet with resnet_time_scale_shift='scale_shift'",
        ),
    ],
)
def test_students_of_conditioned_teachers_that_cannot_be_built_say_why(teacher, spec, text):
    for make in (build, shape):
        with pytest.raises(InputError, match=text):
            make(small(**teacher), spec)
