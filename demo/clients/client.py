"""Python: http.client. HOST PORT PATH COUNT"""

import http.client
import sys

host, port, path, count = sys.argv[1:]
for _ in range(int(count)):
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", path)
    peer = connection.sock.getpeername()[0]
    response = connection.getresponse()
    print(response.headers["X-Pod"], peer, response.read().decode())
    connection.close()
