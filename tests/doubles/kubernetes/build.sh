#!/usr/bin/env bash
# Build a real Kubernetes control plane into a folder, from Debian's packages alone: `make kube`.
#
# Debian 12 is the last release whose source package holds the API server (1.20). It is compiled here, with Debian's Go;
# etcd comes ready. Nothing is installed: packages are unpacked into a folder that is deleted. 5 minutes on two cores.
set -euo pipefail
target=$(realpath --canonicalize-missing "$1")
for program in apt-get dpkg-source go make rsync; do
  command -v "$program" >/dev/null || {
    echo "make kube needs $program: on Debian, apt-get install golang-go dpkg-dev make rsync" >&2
    exit 2
  }
done
work=$(mktemp --directory)
trap 'rm --recursive --force "$work"' EXIT
cd "$work"

# Lists of their own: this machine's apt need not know Debian 12, and is left as it is.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | head --lines 1)
keys=$(ls /usr/share/keyrings/debian-archive-keyring.* | head --lines 1)
mkdir --parents lists/partial
cat >sources.list <<EOF
deb [signed-by=$keys] $mirror trixie main
deb-src [signed-by=$keys] $mirror bookworm main
EOF
apt=(apt-get --quiet --option "Dir::Etc::SourceList=$work/sources.list" --option Dir::Etc::SourceParts=/dev/null
  --option "Dir::State::Lists=$work/lists" --option APT::Sandbox::User=root)
"${apt[@]}" update
"${apt[@]}" source --download-only kubernetes
"${apt[@]}" download etcd-server golang-github-modern-go-reflect2-dev
for package in ./*.deb; do dpkg-deb --extract "$package" unpacked; done
mkdir --parents gopath/src/k8s.io
dpkg-source --extract kubernetes_*.dsc gopath/src/k8s.io/kubernetes

cd gopath/src/k8s.io/kubernetes
# The vendored version stops a program that Go 1.18 or newer compiled.
rm vendor/github.com/modern-go/reflect2/*.{go,s}
cp "$work"/unpacked/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} vendor/github.com/modern-go/reflect2/
env HOME="$work" GOPATH="$work/gopath" GOPROXY=off GOTOOLCHAIN=local CGO_ENABLED=0 \
  make WHAT="cmd/kube-apiserver cmd/kube-controller-manager"
mkdir --parents "$target"
install _output/local/bin/linux/*/kube-{apiserver,controller-manager} "$work/unpacked/usr/bin/etcd" "$target"
echo "Built in $target. Next: .venv/bin/python -m pytest -m kubernetes"
