"""Reading compiled programs: loops, collectives, products and memory traffic of small literal programs."""

import textwrap

import pytest

from safelm.aot import collectives as aot_collectives
from safelm.aot import cost as aot_cost
from safelm.aot import hlo as aot_hlo
from safelm.aot import topology as aot_topology
from safelm.aot import work as aot_work

LOOPS = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%layer_cond (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%layer_body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %gathered = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %product = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%x, %gathered), dim_labels=bf_oi->bf
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%micro_cond (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%micro_body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]) parameter(0)
  %zero = s32[] constant(0)
  %x = bf16[8,16] get-tuple-element(%state), index=1
  %start = (s32[], bf16[8,16]) tuple(%zero, %x)
  %layers = (s32[], bf16[8,16]) while(%start), condition=%layer_cond, body=%layer_body
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%state), index=0
  %next = s32[] add(%i, %one)
  %y = bf16[8,16] get-tuple-element(%layers), index=1
  ROOT %out = (s32[], bf16[8,16]) tuple(%next, %y)
}

ENTRY %main (p: bf16[8,16], g: f32[8,16]) -> f32[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %g = f32[8,16]{1,0} parameter(1)
  %one = s32[] constant(1)
  %from = s32[] copy(%one)
  %start = (s32[], bf16[8,16]) tuple(%from, %p)
  %micro = (s32[], bf16[8,16]) while(%start), condition=%micro_cond, body=%micro_body
  %reduce-start = f32[8,16]{1,0} all-reduce-start(%g), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %reduce-done = f32[8,16]{1,0} all-reduce-done(%reduce-start)
}
"""


def network(name: str = "v5e:2x2") -> tuple[aot_collectives.Network, aot_topology.Slice]:
    """Chips in row-major order."""
    tpu = aot_topology.parse(name)
    places = [(x, y, 0) for x in range(tpu.shape[0]) for y in range(tpu.shape[1])]
    return aot_collectives.Network(tpu, [FakeDevice(place) for place in places]), tpu


class FakeDevice:
    def __init__(self, coords: tuple[int, ...], slice_index: int = 0):
        self.coords, self.slice_index = coords, slice_index


def find(text: str, name: str = "v5e:2x2") -> list[aot_collectives.Collective]:
    return aot_collectives.find(aot_hlo.parse(text), *network(name))


def test_a_loop_counts_as_often_as_it_runs_from_its_start_by_its_step_to_its_bound():
    module = aot_hlo.parse(LOOPS)
    assert module.runs == {"main": 1, "micro_body": 4, "layer_body": 4 * 12}


def test_a_trip_count_that_xla_knows_is_taken():
    known = LOOPS.replace("body=%layer_body", 'body=%layer_body, backend_config={"known_trip_count":{"n":"7"}}')
    assert aot_hlo.parse(known).runs["layer_body"] == 4 * 7


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        aot_hlo.parse("HloModule nothing")


def test_collectives_count_with_their_loops_and_pairs_once():
    gather, reduce = sorted(find(LOOPS), key=lambda c: c.kind)
    assert (gather.kind, gather.runs, gather.group_size, gather.is_async) == ("all-gather", 48, 4, False)
    assert gather.num_bytes == 8 * 16 * 2 * 3  # a chip's shard to three others
    assert (reduce.kind, reduce.runs, reduce.group_size, reduce.is_async) == ("all-reduce", 1, 2, True)
    assert reduce.num_bytes == 2 * 8 * 16 * 4 // 2
    assert aot_collectives.totals([gather, reduce])["ici all-gather"]["bytes"] == 48 * 768


def test_fsdp_costs_what_counting_by_hand_says():
    """P parameters in n shards: gathered in bfloat16 forward and backward, gradients scattered: 3 x 2 P (n - 1) / n."""
    size, shards = 4096, 16
    gathers = 2 * aot_collectives.sent_bytes("all-gather", 2 * size // shards, shards)
    scatter = aot_collectives.sent_bytes("reduce-scatter", 2 * size, shards)
    assert gathers + scatter == 3 * 2 * size * (shards - 1) // shards
    assert aot_collectives.sent_bytes("all-reduce", 2 * size, shards) == 2 * scatter


PIECES = """
HloModule pieces

%start_piece (p: bf16[4,16]) -> (bf16[4,16], bf16[16,16], u32[]) {
  %p = bf16[4,16]{1,0} parameter(0)
  %ag.1 = bf16[16,16]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp','data'}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %cc = (bf16[4,16]{1,0}, bf16[16,16]{1,0}, u32[]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%middle_piece (p: bf16[4,16], q: bf16[16,16]) -> (bf16[16,16], bf16[16,16]) {
  %p = bf16[4,16]{1,0} parameter(0)
  %q = bf16[16,16]{1,0} parameter(1)
  %ag.2 = bf16[16,16]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp','data'}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %product = bf16[16,16]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
  ROOT %t = (bf16[16,16]{1,0}, bf16[16,16]{1,0}) tuple(%product, %ag.2)
}

%scattered (p: f32[16,16]) -> f32[4,16] {
  %p = f32[16,16]{1,0} parameter(0)
  %ar = f32[16,16]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[4,16]{1,0} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={4,16}
}

ENTRY %main (p: bf16[4,16], q: bf16[16,16], g: f32[16,16]) -> f32[4,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  %q = bf16[16,16]{1,0} parameter(1)
  %g = f32[16,16]{1,0} parameter(2)
  %s = (bf16[4,16]{1,0}, bf16[16,16]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%start_piece
  %m = (bf16[16,16]{1,0}, bf16[16,16]{1,0}) fusion(%p, %q), kind=kOutput, calls=%middle_piece
  %hop = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[]) collective-permute-start(%p), source_target_pairs={{0,3},{3,0}}
  %hopped = bf16[4,16]{1,0} collective-permute-done(%hop)
  ROOT %r = f32[4,16]{1,0} fusion(%g), kind=kCustom, calls=%scattered
}
"""  # noqa: E501


def test_an_asynchronous_collective_in_pieces_counts_once_and_a_reduced_slice_is_a_reduce_scatter():
    found = {c.kind: c for c in find(PIECES)}
    assert len(find(PIECES)) == 3
    assert found["all-gather"].is_async and found["all-gather"].num_bytes == 4 * 16 * 2 * 3
    assert found["reduce-scatter"].num_bytes == 16 * 16 * 4 // 2 and found["reduce-scatter"].group_size == 2
    assert found["collective-permute"].num_bytes == 4 * 16 * 2


@pytest.mark.parametrize(
    ("spelled", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_every_spelling(spelled, groups):
    assert aot_collectives.replica_groups(f"channel_id=1, {spelled}, dimensions={{0}}", 4) == groups


def test_a_spelling_of_replica_groups_that_is_not_known_is_an_error_not_a_guess():
    with pytest.raises(ValueError, match="unknown notation"):
        aot_collectives.replica_groups("replica_groups=mesh['a'=4] {'a':(1)2}", 4)


def test_links_rings_have_two_directions_lines_one_and_far_hops_load_every_link_between():
    line, tpu = network("v5e:4x4")
    rate = tpu.chip.link_rate
    assert line.ici_rate([0, 1, 2, 3]) == rate  # a row of four: no wrap
    assert line.ici_rate(list(range(16))) == 2 * rate
    ring, _ = network("v5e:16x16")
    assert ring.ici_rate(list(range(16))) == 2 * rate
    assert ring.ici_rate(list(range(256))) == 4 * rate
    around = [(i, (i + 1) % 4) for i in range(4)]
    assert line.permute_seconds([(100, around)]) == 100 / rate  # the way back uses the other direction
    assert line.permute_seconds([(100, [(0, 3), (1, 3)])]) == 200 / rate
    assert ring.permute_seconds([(100, [(0, 15)])]) == 100 / rate


def test_a_send_of_megascale_and_a_group_over_two_slices_are_dcn():
    text = textwrap.dedent("""
        HloModule slices

        ENTRY %main (g: f32[1000]) -> f32[1000] {
          %g = f32[1000]{0} parameter(0)
          %token = token[] after-all()
          %send = (f32[1000]{0}, u32[], token[]) send(%g, %token), is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
          %send-done = token[] send-done(%send)
          ROOT %reduced = f32[1000]{0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add
        }
    """)  # noqa: E501
    tpu = aot_topology.parse("v5e:1x1", 2)
    both = aot_collectives.Network(tpu, [FakeDevice((0, 0, 0), 0), FakeDevice((0, 0, 0), 1)])
    sent, reduced = aot_collectives.find(aot_hlo.parse(text), both, tpu)
    assert (sent.kind, sent.network, sent.num_bytes) == ("all-reduce", "dcn", 4000)
    assert (reduced.network, reduced.seconds) == ("dcn", 4000 / tpu.chip.dcn_rate)


WORK = """
HloModule work

%fused (stack: f32[24,128,256], i: s32[], x: bf16[512,128]) -> bf16[512,256] {
  %stack = f32[24,128,256]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[512,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,128,256]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,128,256}
  %w = bf16[128,256]{1,0} convert(%slice)
  ROOT %y = bf16[512,256]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%update (stack: f32[24,512], i: s32[], row: f32[1,512]) -> f32[24,512] {
  %stack = f32[24,512]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,512]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[24,512]{1,0} dynamic-update-slice(%stack, %row, %i, %zero)
}

ENTRY %main (stack: f32[24,128,256], x: bf16[512,128], rows: f32[24,512], row: f32[1,512]) -> bf16[512,256] {
  %stack = f32[24,128,256]{2,1,0} parameter(0)
  %x = bf16[512,128]{1,0} parameter(1)
  %rows = f32[24,512]{1,0} parameter(2)
  %row = f32[1,512]{1,0} parameter(3)
  %i = s32[]{:S(6)} constant(3)
  %near = bf16[512,128]{1,0:S(1)} copy(%x)
  %updated = f32[24,512]{1,0} fusion(%rows, %i, %row), kind=kLoop, calls=%update
  ROOT %product = bf16[512,256]{1,0} fusion(%stack, %i, %near), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"300000"}}
}
"""  # noqa: E501


def test_products_and_bytes_of_fusions_slices_updates_and_other_memory():
    module = aot_hlo.parse(WORK)
    main = module.computations["main"]
    moved = {name: aot_work.hbm_bytes_of(module, "main", instruction) for name, instruction in main.items()}
    assert moved["near"] == 512 * 128 * 2  # read from HBM, written to VMEM
    assert moved["updated"] == 2 * 512 * 4  # the row is read and written, the stack stays where it is
    assert moved["product"] == 128 * 256 * 4 + 512 * 256 * 2  # one layer's slice, the result; x is in VMEM
    assert aot_work.flops_of(module, "main", main["product"]) == (2 * 512 * 128 * 256, 0)


def test_a_windowed_product_does_not_count_the_padding():
    """A batched product as TPUs spell it: a window as long as the batch, dilated so that one position meets data."""
    text = """
ENTRY %main (a: bf16[8,128,256], b: bf16[8,256,64]) -> bf16[8,128,64] {
  %a = bf16[8,128,256]{2,1,0} parameter(0)
  %b = bf16[8,256,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,128,64]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    module = aot_hlo.parse(text)
    assert aot_work.flops_of(module, "main", module.computations["main"]["c"])[0] == 2 * 8 * 128 * 256 * 64


@pytest.mark.parametrize(
    ("blocks", "share"),
    [
        ("{}", 0.5),
        (r"{\"block_q\": 128, \"block_kv\": 128, \"block_q_dkv\": 512, \"block_kv_dkv\": 512}", 10 / 16),
        (r"{\"block_q\": 128, \"block_kv\": 256, \"block_kv_compute\": 128}", 6 / 8),
        (r"{\"block_q\": 512, \"block_kv\": 128}", 1),
    ],
)
def test_the_attention_kernel_counts_the_blocks_it_computes_at_the_width_of_the_matrix_unit(blocks, share):
    text = """
ENTRY %main (q: bf16[2,4,512,64], k: bf16[2,2,512,64]) -> bf16[2,4,512,64] {
  %q = bf16[2,4,512,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,512,64]{3,2,1,0} parameter(1)
  ROOT %splash_mha_fwd.1 = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"BLOCKS"
}}, metadata={op_name="jit(step)"}
}
"""  # noqa: E501
    text = text.replace("BLOCKS", blocks)
    module = aot_hlo.parse(text)
    assert aot_work.attention_kernels(module) == {"splash_mha_fwd": 1}
    flops = aot_work.flops_of(module, "main", module.computations["main"]["splash_mha_fwd.1"])
    assert flops == (0, 2 * 2 * 2 * 4 * 512 * 512 * 128 * share)


def test_the_roofline_adds_what_waits_and_hides_what_overlaps():
    chip = aot_topology.CHIPS["v5e"]
    module, found = aot_hlo.parse(WORK), []
    product = max(2 * 512 * 128 * 256 / 1e12, (128 * 256 * 4 + 512 * 256 * 2) / chip.hbm_rate)
    work = product + (512 * 128 * 2 + 2 * 512 * 4) / chip.hbm_rate
    alone = aot_cost.estimate(module, found, chip, 1e12)
    assert alone.seconds == alone.serial_seconds == pytest.approx(work)
    assert alone.cycle_seconds == pytest.approx(work - product + max(product, 300000 / chip.clock_rate))
    collective = aot_collectives.Collective("all-gather", "main", 1, 10, 4, "ici", 5e-7, True, "bf16", "")
    hidden = aot_cost.estimate(module, [collective], chip, 1e12)
    assert hidden.seconds == pytest.approx(work) and hidden.exposed_seconds == pytest.approx(0, abs=1e-12)
    assert hidden.serial_seconds == pytest.approx(work + 5e-7)
    waiting = aot_collectives.Collective("all-gather", "main", 1, 10, 4, "ici", 5e-7, False, "bf16", "")
    assert aot_cost.estimate(module, [waiting], chip, 1e12).seconds == pytest.approx(work + 5e-7)
