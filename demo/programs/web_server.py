"""What runs in a pod: answers GET /api/v1/healthz and says in X-Pod who answered.

web_server.py NAME ADDRESS PORT
"""

import select
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

NAME, ADDRESS, PORT = sys.argv[1], sys.argv[2], int(sys.argv[3])
BODY = b'{"status": {"code": 0, "msg": "success"}, "data": "success"}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = self.path == "/api/v1/healthz"
        body = BODY if known else b'{"status": {"code": 404, "msg": "not found"}}'
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Pod", NAME)
        # Every request is a connection of its own, whatever the client would rather do.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for the answers that are under way
    request_queue_size = 128

    def server_bind(self) -> None:
        # http.server asks DNS for the name of its address, which nobody has here.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, PORT


server = Server((ADDRESS, PORT), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print("ready", flush=True)
server.serve_forever(poll_interval=0.05)
# Whoever has connected is answered, too.
server.timeout = 0
while select.select([server], [], [], 0)[0]:
    server.handle_request()
server.server_close()
