#!/bin/sh
# What both images have below Python: Debian and Ubuntu packages, the user, and where its files go.
# Runs as root while an image is built: system.sh USER_ID GROUP_ID
set -eu
user=$1 group=$2

# python3-dev, g++, libaio-dev: DeepSpeed's ops and Triton's launchers are compiled where they run.
# pdsh, openmpi-bin, ssh: starting ranks on several nodes; procps: pdsh's launcher ends ranks with pkill.
# numactl: binding ranks to cores.  tini: the first process, which passes signals on and reaps.
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends \
    ca-certificates g++ hostname libaio-dev numactl openmpi-bin openssh-client openssh-server pdsh procps \
    python3 python3-dev python3-venv tini
rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* # the package makes host keys, and an image must not share any

# Ubuntu's images come with a user of the id 1000
if other=$(id -nu "$user" 2>/dev/null); then userdel --remove "$other"; fi
getent group "$group" >/dev/null || groupadd --gid "$group" ki_ds
useradd --uid "$user" --gid "$group" --home-dir /home/ki_ds --create-home --shell /bin/bash --password '*' ki_ds
install -d -m 755 -o "$user" -g "$group" /workspace
install -d -m 1777 /cache # also for a user chosen by docker run --user

here=$(dirname "$0")
install -D -m 644 "$here/sshd_config" /etc/ki_ds/sshd_config
install -D -m 644 "$here/ssh_config" /etc/ssh/ssh_config.d/ki_ds.conf
install -D -m 755 -t /usr/local/lib/ki_ds "$here/entrypoint.sh" "$here/session.sh" "$here/healthcheck.sh"
