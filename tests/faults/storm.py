"""A storm: a crowd of clients that leave while they wait, read slowly, or want more than there is room for."""

import json
import random
import threading
import time
from collections import Counter
from http.client import HTTPException

from tests.faults.servers import MODEL, QUESTION, Attacked

CLIENTS = 12


def storm(attacked: Attacked, seconds: float, seed: int) -> Counter[str]:
    """Let a crowd ask for that long; return how often each kind of client came to its end."""
    done: Counter[str] = Counter()
    lock, over = threading.Lock(), time.monotonic() + seconds

    def behave(number: int) -> None:
        chance = random.Random(f"{seed}-{number}")
        while time.monotonic() < over:
            how = ask_as(attacked, chance)
            with lock:
                done[how] += 1

    crowd = [threading.Thread(target=behave, args=(number,)) for number in range(CLIENTS)]
    for client in crowd:
        client.start()
    for client in crowd:
        client.join()
    return done


def ask_as(attacked: Attacked, chance: random.Random) -> str:
    """Ask as a client of a random kind; return what became of it."""
    kind = chance.choice(("leaves at once", "leaves in the answer", "reads slowly", "wants all"))
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{chance.random()} {QUESTION * chance.randint(1, 3)}"}],
        "max_tokens": chance.randint(100, 400),
        "ignore_eos": True,
        "stream": kind != "wants all",
        "n": chance.choice((1, 1, 2)),
        "temperature": 1.0,
        "presence_penalty": chance.choice((0, 1)),
        "vllm_xargs": {"loops": chance.randint(1, 8), "exit_threshold": chance.choice((1, 0.6))},
    }
    if chance.random() < 0.2:
        body["structured_outputs"] = {"regex": "[a-z ]{1,200}"}
    connection = attacked.connect()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if kind == "leaves at once":
            time.sleep(chance.random() / 5)
            return kind
        answer = connection.getresponse()
        if kind == "leaves in the answer":
            for _ in range(chance.randint(1, 20)):
                answer.readline()
        elif kind == "reads slowly":
            while answer.read(2000):
                time.sleep(0.05)
        else:
            answer.read()
        return kind if answer.status == 200 else f"{kind}: {answer.status}"
    except (OSError, HTTPException) as error:
        return f"{kind}: {type(error).__name__}"
    finally:
        connection.close()


def settle(attacked: Attacked, seconds: float = 20) -> dict[str, int]:
    """Wait until nothing runs; return what still runs, waits or holds rows then."""
    until = time.monotonic() + seconds
    while True:
        now = attacked.now()
        left = {name: now[name] for name in ("running", "waiting", "kv_in_use_bytes") if now[name]}
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)
