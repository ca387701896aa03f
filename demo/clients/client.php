<?php
// PHP: stream_socket_client. HOST PORT PATH COUNT
[, $host, $port, $path, $count] = $argv;
for ($i = 0; $i < (int) $count; $i++) {
    $socket = stream_socket_client("tcp://$host:$port", $code, $message) or exit("$message\n");
    $peer = strstr(stream_socket_get_name($socket, true), ':', true);
    fwrite($socket, "GET $path HTTP/1.1\r\nHost: $host\r\nConnection: close\r\n\r\n");
    [$head, $body] = explode("\r\n\r\n", stream_get_contents($socket), 2);
    preg_match('/^X-Pod: (\S+)/m', $head, $pod);
    echo "$pod[1] $peer $body\n";
    fclose($socket);
}
