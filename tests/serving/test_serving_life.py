"""A server's life: a failing engine, time limits, keys, many clients at once, draining; and that its logs hold no text.

Behind every test: the server answers the next request, and no slot is left behind.
"""

import asyncio
import concurrent.futures
import json
import logging
import signal
import subprocess
import sys
import threading

from serving_fakes import (
    COMPLETION,
    FakeEngine,
    is_empty,
    number_open,
    post,
    running,
    serve,
    start,
    tiny_model,
    wait_for,
)
from serving_fakes import http as ask

from safelm.serving.limits import Limits

LIMITS = Limits(new_tokens=450)


def test_a_failing_engine_ends_its_requests_and_is_replaced(server, script, caplog):
    script.may_go.clear()
    script.text = "must not be logged"
    connections = [start(server, stream=stream) for stream in (False, True)]
    wait_for(lambda: sum(server.server.service.worker.num_active.values()) == 2, "both are active")
    with caplog.at_level(logging.INFO):
        script.fail_next_step = True
        for connection in connections:
            response = connection.getresponse()
            assert response.status == 500
            assert "the engine failed (ArithmeticError)" in json.loads(response.read())["error"]["message"]
            connection.close()
    assert "ArithmeticError" in caplog.text and "must not be logged" not in caplog.text


def test_an_engine_that_can_not_be_replaced_at_once_ends_requests_and_is_tried_again(script):
    rooms = [True, False, True]  # whether an engine can be made

    def make():
        if not rooms.pop(0):
            raise MemoryError
        return FakeEngine(script)

    with running({"tiny": tiny_model()}, {"tiny": make}, limits=LIMITS) as server:
        script.fail_next_step = True
        assert "the engine failed (ArithmeticError)" in post(server, COMPLETION).error["message"]
        is_empty(server)
        answer = post(server, COMPLETION)
        assert answer.status == 500 and "can't be made anew (MemoryError)" in answer.error["message"]
        assert ask(server, "GET", "/health").status == post(server, COMPLETION).status == 200 and not rooms


def test_a_failure_in_mid_stream_is_told_in_the_stream(server, script):
    script.text, script.fail_at = "a b " * 100, 3
    connection = start(server, stream=True, max_tokens=450)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    events = response.read().decode().strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
    connection.close()


def test_a_request_ends_when_its_time_is_over(script):
    script.text = "a b " * 100
    with serve(script, limits=Limits(request_seconds=0.3, new_tokens=450)) as server:
        script.may_go.clear()
        answer = post(server, COMPLETION)
        assert (
            answer.status == 408 and answer.error["code"] == "timeout" and answer.headers["x-should-retry"] == "false"
        )
        script.hold_at = 3
        script.may_go.set()
        connection = start(server, stream=True, max_tokens=450)
        response = connection.getresponse()
        events = response.read().decode().strip().split("\n\n")
        ending = json.loads(events[-2].removeprefix("data: "))
        assert ending["choices"][0]["finish_reason"] == "length" and ending["safelm"]["stopped_by"] == "time"
        connection.close()
        script.hold_at = None
        is_empty(server)
    script.may_go.set()


def test_a_score_ends_when_its_time_is_over(script):
    script.text, script.hold_at = "a b " * 100, 1
    with serve(script, limits=Limits(request_seconds=0.3, new_tokens=450)) as server:
        connection = start(server, max_tokens=450)
        with script.long_step():
            answer = post(server, {"input": "the"}, "/v1/safelm/score")
            assert answer.status == 408 and answer.headers["x-should-retry"] == "false"
        connection.close()
        script.hold_at = None
        is_empty(server)


def test_a_key_is_asked_for(script):
    with serve(script, limits=LIMITS, key="sesame-\u00e9") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer "},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = ask(server, "GET", path, headers=headers)
                assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert post(server, COMPLETION, **headers).status == 401
        for path in ("/", "/health"):
            assert ask(server, "GET", path).status == 200
        good = {"Authorization": "Bearer sesame-\u00e9".encode()}
        assert ask(server, "GET", "/v1/models", headers=good).status == 200


def test_draining_finishes_what_is_under_way_and_refuses_what_is_new(script):
    script.text = " the cat"
    with serve(script, limits=Limits(grace_seconds=60.0)) as server:
        script.may_go.clear()
        connection = start(server)
        wait_for(lambda: number_open(server) == 1, "it is open")
        drained = asyncio.run_coroutine_threadsafe(server.server.drain(), server.loop)
        wait_for(lambda: server.server.service.admission.is_draining, "it drains")
        answer = post(server, COMPLETION)
        assert answer.status == 503 and answer.error["code"] == "shutting_down" and answer.headers["retry-after"] == "5"
        health = ask(server, "GET", "/health")
        assert health.status == 503 and health.json == {"status": "draining"}
        script.may_go.set()
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == " the cat"
        connection.close()
        drained.result(60)


def test_when_the_grace_period_is_over_what_is_left_is_ended(script):
    with serve(script, limits=Limits(grace_seconds=0.05)) as server:
        script.may_go.clear()
        connection = start(server)
        wait_for(lambda: sum(server.server.service.worker.num_active.values()) == 1, "it is active")
        server.run(server.server.drain())
        response = connection.getresponse()
        assert response.status == 503 and json.loads(response.read())["error"]["code"] == "shutting_down"
        connection.close()
        is_empty(server)
    script.may_go.set()


def test_the_end_waits_for_no_step(script):
    script.text, script.hold_at = "a b " * 100, 1
    with serve(script, limits=Limits(grace_seconds=0.05, new_tokens=450)) as server:
        connection = start(server, stream=True, max_tokens=450)
        response = connection.getresponse()
        response.readline()
        with concurrent.futures.ThreadPoolExecutor() as pool, script.long_step():
            scored = pool.submit(post, server, {"input": "the"}, "/v1/safelm/score")
            wait_for(lambda: number_open(server) == 2, "both are open")
            server.run(server.server.drain())
            assert scored.result().status == 503
            events = response.read().decode().strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        connection.close()
    script.hold_at = None


_BUSY = """
import asyncio, time
from safelm.serving.listening import told_to_end

async def main():
    told = told_to_end()
    print("ready", flush=True)
    await told.wait()
    print("told", flush=True)
    await asyncio.to_thread(time.sleep, 600)

asyncio.run(main())
"""


def test_a_second_signal_waits_for_no_thread():
    process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, text=True)
    try:
        for said in ("ready", "told"):
            assert process.stdout.readline().strip() == said
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_logs_hold_no_text(server, script, caplog):
    script.text = " the dog secretly"
    with caplog.at_level(logging.DEBUG):
        post(server, COMPLETION | {"prompt": "my prompt is private", "user": "a private user"})
        post(server, {"messages": [{"role": "user", "content": "private too"}]}, "/v1/chat/completions")
        post(server, {"input": "private as well"}, "/v1/safelm/score")
        post(server, b'{"prompt": "private, not JSON')
        is_empty(server)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("safelm", "aiohttp"))]
    assert len(ours) >= 3 and not any("private" in line or "dog" in line for line in ours)


def test_many_clients_with_random_manners_leave_nothing_behind(script):
    script.text = "the cat sat " * 5
    with serve(script, slots=2, limits=Limits(open_requests=8)) as server:
        statuses = []

        def client(number):
            for turn in range(4):
                connection = start(server, stream=bool(turn % 2), max_tokens=40)
                if (number + turn) % 3 == 0:
                    connection.close()
                    continue
                response = connection.getresponse()
                statuses.append(response.status)
                response.read(10 if (number + turn) % 4 == 0 else None)
                connection.close()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        is_empty(server)
        assert set(statuses) <= {200, 429} and 200 in statuses
        assert post(server, COMPLETION).status == 200
