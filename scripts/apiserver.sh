#!/bin/sh
# Builds what the tests of runtimeclass/, of the node's labels and of whole clusters need:
# a real API server with etcd, kubectl, helm, controllers, scheduler, kubelet, kubeadm and
# promtool, from their Go modules, into a directory of their own. Nothing is installed or
# started: the tests do that, on ports or in a network of their own.
#
#   scripts/apiserver.sh [PREFIX]      (default: target/kube)
#
# It takes some twenty minutes on two cores, once. What is there already is left as
# it is; without Go, or where a module can't be had, the tests say that they skip.
set -eu

here=$(dirname "$0")
prefix=${1:-$here/../target/kube}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)

kubernetes=1.36.3
etcd=v3.6.8
helm=v3.21.4
prometheus=v0.316.0

lacks() { [ ! -x "$prefix/$1" ]; }
complete() {
    for program in etcd kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kubeadm helm promtool; do
        ! lacks "$program" || return 1
    done
}
! complete || exit 0
if ! command -v go >/dev/null; then
    echo "apiserver: no Go here: the tests with an API server are skipped" >&2
    exit 0
fi

# One at a time: two test runs may begin together.
exec 9>"$prefix/lock"
flock 9
! complete || exit 0

build=$prefix/build
mkdir -p "$build"
# Kubernetes' own go.mod has its staging modules as directories, which a module that
# depends on it lacks: they are published as v0.MINOR.PATCH.
staging() {
    gomod=$(cd "$build" && go mod download -json "k8s.io/kubernetes@v$kubernetes" |
        sed -n 's/^[[:space:]]*"GoMod": "\(.*\)",$/\1/p')
    [ -n "$gomod" ]
    version=v0.${kubernetes#1.}
    {
        echo "module casemate.test/kube"
        grep -E '^(go|godebug) ' "$gomod"
        echo "require k8s.io/kubernetes v$kubernetes"
        echo "require go.etcd.io/etcd/server/v3 $etcd"
        sed -nE 's#^[[:space:]]*(k8s.io/[a-z-]+) => .*#replace \1 => \1 '"$version"'#p' "$gomod"
    } >"$build/go.mod"
    printf '//go:build never\n\npackage main\n' >"$build/main.go"
}
# Moved to its place whole, or not at all.
make() {
    lacks "$1" || return 0
    echo "building $1 into $prefix …"
    flags="-s -w -X k8s.io/component-base/version.gitVersion=v$kubernetes"
    (cd "$build" && CGO_ENABLED=0 GOFLAGS=-mod=mod nice -n 15 timeout 3000 \
        go build -ldflags "$flags" -o "new-$1" "$2") 2>"$prefix/go.log" &&
        mv "$build/new-$1" "$prefix/$1"
}
install() {
    lacks "$1" || return 0
    echo "building $1 into $prefix …"
    GOBIN=$build CGO_ENABLED=0 nice -n 15 timeout 1800 \
        go install -ldflags "-s -w" "$2" 2>"$prefix/go.log" &&
        mv "$build/$1" "$prefix/$1"
}
if staging 2>"$prefix/go.log" &&
    make etcd go.etcd.io/etcd/server/v3 &&
    make kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver &&
    make kubectl k8s.io/kubernetes/cmd/kubectl &&
    make kubelet k8s.io/kubernetes/cmd/kubelet &&
    make kube-controller-manager k8s.io/kubernetes/cmd/kube-controller-manager &&
    make kube-scheduler k8s.io/kubernetes/cmd/kube-scheduler &&
    make kubeadm k8s.io/kubernetes/cmd/kubeadm &&
    install helm "helm.sh/helm/v3/cmd/helm@$helm" &&
    install promtool "github.com/prometheus/prometheus/cmd/promtool@$prometheus"; then
    rm -rf "$build"
else
    tail -n 3 "$prefix/go.log" >&2
    echo "apiserver: can't be built here: the tests with an API server are skipped" >&2
fi
