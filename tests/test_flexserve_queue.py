"""The queue of a server, its workers replaced by sums: who is served when, whatever the machine does."""
import random

import numpy as np
import pytest

from opml_wb.flexserve.workers.batching import BatchQueue, Part, Request

SIZES = 1, 2, 4, 8


def asked(queue, client, images):
    "A request of `client` in the queue."
    request = Request([b"x"] * images, client=client)
    request.weigh(queue.costs)
    queue.push(Part(request, 0, images))
    return request


def served(queue, most, seconds):
    "The next batch: (seconds of work in it, requests that it finishes)."
    parts = queue.take(most, seconds)
    for part in parts: part.request.left -= len(part)
    return sum(queue.costs.part(p.weights) for p in parts), [p.request for p in parts if not p.request.left]


@pytest.mark.parametrize("most", (4, 8, 32))
@pytest.mark.parametrize("connections", (3, 16))
def test_a_clients_connections_come_first_first_served(connections, most):
    "No request waits for more work than there was when it came, and what its own batches have beside it."
    queue, done, came = BatchQueue(), 0., {}
    def come(n, k):
        ahead = sum(queue.costs.part([w] * r.left) for r, *_ in came.values() for w in r.weights[:1])
        request = asked(queue, ("one", n), SIZES[(n + k) % 4])
        came[n] = request, k, done + ahead + queue.costs.part(request.weights)
    for n in range(connections): come(n, 0)
    batch = 0.
    for _ in range(400):
        took, ended = served(queue, most, .1)
        done, batch = done + took, max(batch, took)
        for request in ended:
            n = request.client[1]
            _, k, latest = came.pop(n)
            assert done <= latest + batch, (n, k, len(request.images))
            come(n, k + 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_connection_that_asks_for_much_lets_the_others_of_its_client_pass(seed):
    "However much it asks for, it has a quantum for each turn of a small one."
    rng, queue = random.Random(seed), BatchQueue(quantum=.1)
    for _ in range(20): asked(queue, ("one", "much"), 256)
    for turn in range(50):
        small, done = asked(queue, ("one", f"small {turn}"), rng.choice(SIZES)), 0.
        while small.left: done += served(queue, 32, .1)[0]
        assert done <= .1 + .1 + queue.costs.part(small.weights) + .1      # its quantum, begun before or not, and the batch
    assert queue.images > 256


@pytest.mark.parametrize("connections", (1, 40))
def test_clients_share_whatever_their_connections_ask(connections):
    "One with many connections and large requests gets no more than one with a single connection."
    queue, had = BatchQueue(), {"many": 0., "single": 0.}
    for k in range(60):
        for n in range(connections): asked(queue, ("many", n), 8)
        for _ in range(8): asked(queue, ("single", 0), 1)
    for _ in range(50):
        for part in queue.take(8, .1): had[part.request.client[0]] += queue.costs.part(part.weights)
    assert .9 <= had["many"] / had["single"] <= 1.1


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_given_twice_or_out_of_its_order(seed):
    "Whatever comes, is taken, is corrected and comes back: each image of each request once, a connection's in order."
    rng = random.Random(seed)
    queue, left, order = BatchQueue(quantum=rng.choice((.01, .1, 5.))), {}, {}
    def given(parts):
        for part in parts:
            images = set(range(part.start, part.stop))
            assert images <= left[part.request]
            if not part.alone: assert part.request is next(r for r in order[part.request.client] if left[r])
            left[part.request] -= images
    for _ in range(600):
        if rng.random() < .4:
            path = rng.choice("abc"), rng.randrange(4)
            request = asked(queue, path, rng.choice((1, 3, 8, 40)))
            left[request] = set(range(len(request.images)))
            order.setdefault(path, []).append(request)
            continue
        parts = queue.take(rng.choice((1, 5, 32)), rng.choice((.001, .05, 1.)), long=rng.choice((.001, 1.)))
        queue.correct(parts, rng.choice((-1., -.01, .01, 1.)))
        if rng.random() < .1: queue.retry(parts); continue
        given(parts)
    while parts := queue.take(32): given(parts)
    assert not any(left.values()) and not queue.images and np.isclose(queue.waiting.cost, 0)
