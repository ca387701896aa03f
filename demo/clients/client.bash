# Bash: /dev/tcp, which does not tell the peer. HOST PORT PATH COUNT
set -e
for ((i = 0; i < $4; i++)); do
    exec 3<>"/dev/tcp/$1/$2"
    printf 'GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$3" "$1" >&3
    pod= body=
    while read -r line && [ "$line" != $'\r' ]; do
        case $line in X-Pod:*) pod=${line#X-Pod: } ;; esac
    done <&3
    read -r body <&3 || true # the body ends without a newline
    echo "${pod%$'\r'} - $body"
    exec 3>&-
done
