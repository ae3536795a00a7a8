// Command controlplane is etcd and the Kubernetes control plane in one binary,
// chosen by the first argument, so that tests need one build and no container.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

const usage = "usage: controlplane etcd|kube-apiserver|kube-controller-manager|kube-scheduler [flags]\n" +
	"       controlplane certificates DIRECTORY ADDRESS"

var components = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
}

func main() {
	if len(os.Args) < 2 {
		fail(usage)
	}
	name := os.Args[1]
	os.Args = append([]string{name}, os.Args[2:]...)
	switch command, known := components[name]; {
	case known:
		os.Exit(cli.Run(command()))
	case name == "etcd":
		etcdmain.Main(os.Args)
	case name == "certificates" && len(os.Args) == 3:
		if err := certificates(os.Args[1], os.Args[2]); err != nil {
			fail(err.Error())
		}
	default:
		fail(usage)
	}
}

func fail(line string) {
	fmt.Fprintln(os.Stderr, line)
	os.Exit(2)
}
