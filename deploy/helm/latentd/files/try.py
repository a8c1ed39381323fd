"""Whether the server is ready, and makes an image where no API key is needed: what `helm test` runs."""

import http.client
import json
import socket
import sys

REQUEST = {"prompt": "a red heart", "num_inference_steps": 1, "seed": 1}


def ask(address: tuple[str, int], method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=300)
    headers = {"Accept": "image/png", "Content-Type": "application/json"} if body else {}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def main(name: str, port: str) -> str | None:
    """What is wrong with the server at `name`. It is asked by its address, which allowed_hosts need not have."""
    address = socket.gethostbyname(name), int(port)
    status, text = ask(address, "GET", "/v2/health/ready")
    if status != 200:
        return f"not ready ({status}): {text.decode()}"
    status, image = ask(address, "POST", "/generate", REQUEST)
    if status != 401 and not (status == 200 and image.startswith(b"\x89PNG")):
        return f"no image ({status}): {image[:500]!r}"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
