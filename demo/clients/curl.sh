# curl. HOST PORT PATH COUNT
set -e
for _ in $(seq "$4"); do
    answer=$(curl --silent --show-error --fail \
        --write-out '|%header{x-pod} %{remote_ip}' "http://$1:$2$3")
    echo "${answer##*|} ${answer%|*}"
done
