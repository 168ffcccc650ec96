"""Many searches on one encoder: shared batches, and trouble that stays with the search that has it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders, Oracle

from geoengine.engine.batching import SharedEncoders
from geoengine.engine.errors import BackendError
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.shared_search import SearchEndedError

LATEST_S = 20  # only a test that fails waits for so long


class Encoder:
    """A backend whose embedding of a picture is its mean colour; notes what it is asked for, and may fail."""

    name, variant, batch, max_batch = "made", "fp32", 32, 32

    def __init__(self, *, held=False, poison=(), hook=lambda groups: None):
        self.go_on, self.entered = threading.Event(), threading.Event()
        if not held:
            self.go_on.set()
        self.poison, self.hook = set(poison), hook
        self.batches, self.closed = [], False

    def encode_mixed(self, groups):
        self.entered.set()
        assert self.go_on.wait(LATEST_S)
        self.batches.append([(name, pixels[:, 0, 0, 0].tolist()) for name, pixels in groups])
        self.hook(groups)
        for _, pixels in groups:
            if self.poison & set(pixels[:, 0, 0, 0].tolist()):
                raise RuntimeError("a node is odd")
        return [pixels.mean(axis=(1, 2), dtype=np.float32) + float(name == "z06") for name, pixels in groups]

    def close(self):
        self.closed = True


@pytest.fixture
def shared():
    opened = []

    def make(backend, **options):
        opened.append(SharedEncoders(backend, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.backend.go_on.set()
        one.close()
        assert not one._thread.is_alive()


def pictures(*numbers):
    """Pictures of one colour each, and their digests."""
    pixels = np.stack([np.full((2, 2, 3), number, np.uint8) for number in numbers])
    return pixels, [sha256(picture).digest() for picture in pixels]


def append(encoders, encoder, *numbers):
    rows = encoders.rows(encoder, len(numbers))
    rows.append(*pictures(*numbers))
    return rows


def until(condition):
    end = time.monotonic() + LATEST_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_pictures_of_all_searches_and_levels_share_a_batch(shared):
    backend = Encoder(held=True)
    done = []
    one = shared(backend, on_batch=done.append)
    searches = [one.search(name) for name in ("ann", "bob", "cid")]
    first = append(searches[0], "z04", 1)
    until(backend.entered.is_set)
    ann, bob, cid = searches
    rows = append(ann, "z04", 2, 3), append(bob, "z06", 4), append(cid, "z04", 5)
    backend.go_on.set()
    found = [one.download()[:, 0].tolist() for one in (first, *rows)]
    assert found == [[1], [2, 3], [5], [5]]
    assert backend.batches == [[("z04", [1])], [("z04", [2, 3, 5]), ("z06", [4])]]
    assert [(b.pictures, b.searches, b.encoders, b.failed) for b in done] == [(1, 1, 1, 0), (4, 3, 2, 0)]
    assert all(b.seconds >= 0 for b in done)


def test_equal_pictures_of_a_level_are_encoded_once(shared):
    backend = Encoder(held=True)
    one = shared(backend, kept=2)
    ann, bob = one.search("ann"), one.search("bob")
    rows = [append(ann, "z04", 7, 8), append(bob, "z04", 8, 7), append(bob, "z06", 7)]
    backend.go_on.set()
    assert [r.download()[:, 0].tolist() for r in rows] == [[7, 8], [8, 7], [8]]
    assert sum(len(numbers) for batch in backend.batches for _, numbers in batch) == 3
    assert append(ann, "z06", 7).download()[0, 0] == 8
    assert append(ann, "z04", 7).download()[0, 0] == 7  # only two are kept, and this is the oldest
    state = one.state
    assert (state.encoded, state.shared, state.known) == (4, 2, 1)


def test_what_may_not_be_kept_is_encoded_again(shared):
    backend = Encoder()
    one = shared(backend, kept=0)
    for _ in range(2):
        assert append(one.search("ann"), "z04", 7).download()[0, 0] == 7
    assert len(backend.batches) == 2


def test_photos_have_no_digest_and_are_nobody_elses(shared):
    backend = Encoder()
    one = shared(backend)
    for _ in range(2):
        assert one.search("ann").encode("photo", pictures(7, 7)[0])[:, 0].tolist() == [7, 7]
    assert backend.batches == [[("photo", [7, 7])], [("photo", [7, 7])]]
    assert one.search("ann").encode("photo", pictures(7)[0][:0]).shape[0] == 0


def test_the_callers_array_is_its_own_at_once(shared):
    backend = Encoder(held=True)
    rows = shared(backend).search("ann").rows("z04", 4)
    pixels, digests = pictures(1, 2)
    rows.append(pixels, digests)
    pixels[:] = 0
    backend.go_on.set()
    assert rows.download()[:, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="room for 4 embeddings, got 2 and 3 more"):
        rows.append(*pictures(1, 2, 3))


def test_clients_take_turns(shared):
    backend = Encoder(held=True)
    one = shared(backend)
    append(one.search("zoe"), "z04", 250)
    until(backend.entered.is_set)
    many, few = one.search("ann"), one.search("bob")
    long = append(many, "z04", *range(100))
    short = append(few, "z04", *range(100, 110))
    backend.go_on.set()
    short.download(), long.download()
    [(_, numbers)] = backend.batches[1]
    assert {*range(100, 110)} <= set(numbers), "who asks for little does not wait for who asks for much"
    assert len(numbers) == 32


def test_a_search_waits_when_it_has_much_in_the_queue(shared):
    backend = Encoder(held=True)
    one = shared(backend)
    rows = one.search("ann").rows("z04", 256)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(lambda: [rows.append(*pictures(n)) for n in range(200)])
        until(backend.entered.is_set)
        time.sleep(0.1)
        assert not last.done()
        assert one.state.waiting <= 4 * backend.batch
        backend.go_on.set()
        last.result(LATEST_S)
    assert rows.download()[:, 0].tolist() == list(range(200))


def test_a_poisoned_picture_fails_its_own_searches_only(shared, caplog):
    backend = Encoder(held=True, poison={9})
    done = []
    one = shared(backend, on_batch=done.append)
    ann, bob, cid = (one.search(name) for name in ("ann", "bob", "cid"))
    append(one.search("zoe"), "z04", 250)
    until(backend.entered.is_set)
    rows = [append(ann, "z04", 1, 9, 2), append(bob, "z04", *range(20, 30))]
    rows += [append(cid, "z04", 9), append(cid, "z06", 3)]
    backend.go_on.set()
    assert rows[1].download()[:, 0].tolist() == list(range(20, 30))
    for failed in (rows[0], rows[2], rows[3]):
        with pytest.raises(BackendError, match=r"the encoder failed \(RuntimeError: a node is odd\)"):
            failed.download()
    assert done[-1].failed == 1 and not one.state.failing
    assert "RuntimeError" in caplog.text
    assert append(bob, "z04", 2).download()[0, 0] == 2, "what the failed search wanted too is not lost"
    with pytest.raises(BackendError, match="a node is odd"):
        ann.rows("z04", 1).append(*pictures(1))


def test_an_encoder_that_always_raises_fails_all_and_says_why(shared):
    backend = Encoder(poison=range(256))
    one = shared(backend)
    for number in range(3):
        assert not one.state.failing
        with pytest.raises(BackendError, match="a node is odd"):
            append(one.search("ann"), "z04", number).download()
        until(lambda count=number + 1: one.state.failures == count)
    assert one.state.failing and "a node is odd" in one.state.reason
    backend.poison.clear()
    append(one.search("ann"), "z04", 1).download()
    until(lambda: not one.state.failing)


def test_wrong_numbers_of_embeddings_are_an_error(shared):
    backend = Encoder()
    backend.encode_mixed = lambda groups: [np.zeros((3, 3), np.float32)]
    with pytest.raises(BackendError, match="the encoder gave 3 embeddings for 1 pictures"):
        append(shared(backend).search("ann"), "z04", 1, 2).download()


def test_nobody_waits_for_an_encoder_that_hangs_beyond_the_deadline(shared):
    backend = Encoder(held=True)
    one = shared(backend)
    late = one.search("ann", until=time.monotonic() + 0.2)
    rows = append(late, "z04", 1)
    with pytest.raises(SearchEndedError, match="did not end in time"):
        rows.download()
    with pytest.raises(SearchEndedError, match="did not end in time"):
        late.check()
    assert one.state.busy_s > 0.1
    full = one.search("bob", until=time.monotonic() + 0.3)
    with pytest.raises(SearchEndedError, match="did not end in time"):
        for number in range(200):
            append(full, "z04", number)


def test_a_cancelled_search_ends_and_its_pictures_are_not_encoded(shared):
    backend = Encoder(held=True)
    one = shared(backend)
    ann, bob = one.search("ann"), one.search("bob")
    append(one.search("zoe"), "z04", 250)
    until(backend.entered.is_set)
    rows, also = append(ann, "z04", 1, 2, 3), append(bob, "z04", 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rows.download)
        time.sleep(0.05)
        ann.cancel("the client has left")
        with pytest.raises(SearchEndedError, match="the client has left"):
            waiting.result(LATEST_S)
    backend.go_on.set()
    assert also.download()[0, 0] == 3
    encoded = [[("z04", [250])], [("z04", [3])]]
    assert backend.batches == encoded, "what another one wants is encoded all the same"
    assert one.state.waiting == 0


def test_closing_frees_everybody(shared):
    backend = Encoder(held=True)
    one = shared(backend)
    rows = append(one.search("ann"), "z04", 1), append(one.search("bob"), "z04", 2)
    until(backend.entered.is_set)
    one.close(timeout_s=0.05)
    for waiting in rows:
        with pytest.raises(SearchEndedError, match="closed"):
            waiting.download()
    assert not backend.closed, "a backend is not closed under a batch"
    with pytest.raises(SearchEndedError, match="closed"):
        append(one.search("cid"), "z04", 3)
    backend.go_on.set()
    one._thread.join(LATEST_S)
    one.close()
    assert backend.closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_encoder_thread_that_dies_takes_nobody_along(shared):
    def leave(groups):
        raise SystemExit

    backend = Encoder(hook=leave)
    one = shared(backend)
    with pytest.raises(SearchEndedError, match="closed"):
        append(one.search("ann"), "z04", 1).download()


def test_searches_at_once_find_what_each_finds_alone(shared):
    oracle, rng = Oracle((2, 4, 6)), np.random.default_rng(3)
    queries = oracle.photos(rng.uniform(-180, 180, 12), rng.uniform(-80, 80, 12))
    config = SearchConfig(k=3, levels=(2, 4, 6))
    alone = [search(q[None], AddressTiles(), HostEncoders(oracle.encode), config) for q in queries]
    backend = Encoder()
    backend.encode_mixed = lambda groups: [oracle.encode(name, pixels) for name, pixels in groups]
    one = shared(backend)
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(
            lambda at: search(at[1][None], AddressTiles(), one.search(f"client {at[0] % 3}"), config),
            enumerate(queries),
        )
        assert list(together) == alone
    wanted = sum(level.candidates for [levels] in alone for level in levels)
    assert one.state.encoded < wanted - 11 * 16, "the first level was encoded for all"


def test_an_interrupted_search_leaves_no_thread(shared):
    one = shared(Encoder())
    ann = one.search("ann")
    before = threading.active_count()

    def progress(*_):
        ann.cancel("the client has left")
        ann.check()

    with pytest.raises(SearchEndedError, match="has left"):
        search(np.ones((1, 3), np.float32), AddressTiles(), ann, SearchConfig(levels=(4,)), progress=progress)
    assert threading.active_count() == before
