#!/bin/sh
# `node` waits to be reached over ssh, as a node of a job on several machines. Any other command is run as it is.
set -eu
[ "${1:-}" = node ] || exec "$@"
for file in authorized_keys ssh_host_ed25519_key; do
    if [ ! -r "$HOME/.ssh/$file" ]; then
        echo "error: $HOME/.ssh/$file cannot be read by user $(id -u); expected the folder of keys to be mounted at" \
            "$HOME/.ssh and to belong to that user (docs/docker.md, several nodes)" >&2
        exit 2
    fi
done
umask 077
export -p >"$HOME/.node-environment" # sshd starts sessions with an empty one; session.sh reads this
exec /usr/sbin/sshd -D -e -f /etc/ki_ds/sshd_config
