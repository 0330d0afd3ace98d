// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
)

// BenchmarkLaunch times the way from a call to the command's first instruction,
// and the way back, for this package and for the plain containerd client, one
// after the other in every round so that both meet the same machine:
//
// cpu-ms is what a launch and its end cost in CPU time, outside this process;
// unlike the others it means something on a busy machine, too.
//
//	bulkhead     Create, Start, with logger, seccomp and all limits
//	plain        NewContainer, NewTask, Start with containerd's defaults, no output
//	plain+log    the same with our logger: what that costs
func BenchmarkLaunch(b *testing.B) {
	r := start(b)
	ctx := namespaces.WithNamespace(context.Background(), r.cfg.Namespace)
	uri, err := url.Parse(r.loggerURI(logConfig(runtime.Spec{LogDir: b.TempDir()})))
	if err != nil {
		b.Fatal(err)
	}
	rounds := []struct {
		name string
		run  func(id string) (up, down time.Duration, err error)
		up   []time.Duration
		down []time.Duration
		cpu  time.Duration
	}{
		{name: "bulkhead", run: func(id string) (time.Duration, time.Duration, error) { return launchOurs(ctx, r, id) }},
		{name: "plain", run: func(id string) (time.Duration, time.Duration, error) { return launchPlain(ctx, r, id, cio.NullIO) }},
		{name: "plain+log", run: func(id string) (time.Duration, time.Duration, error) {
			return launchPlain(ctx, r, id, cio.LogURI(uri))
		}},
	}
	usage := daemonCPU(b)
	n := 0
	for b.Loop() {
		for i := range rounds {
			v := &rounds[(i+n)%len(rounds)]
			before := usage()
			up, down, err := v.run(fmt.Sprintf("b%d-%d-%d", os.Getpid(), n, i))
			if err != nil {
				b.Fatal(v.name, ": ", err)
			}
			v.up, v.down = append(v.up, up), append(v.down, down)
			v.cpu += usage() - before
		}
		n++
	}
	for _, v := range rounds {
		b.ReportMetric(ms(v.up, 50), v.name+"-p50-ms")
		b.ReportMetric(ms(v.up, 90), v.name+"-p90-ms")
		b.ReportMetric(ms(v.down, 50), v.name+"-down-ms")
		b.ReportMetric(float64(v.cpu.Microseconds())/1000/float64(n), v.name+"-cpu-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// daemonCPU answers a reading of the CPU time that containerd, its shims and the
// tasks have taken. It puts containerd into a cgroup of its own.
func daemonCPU(b *testing.B) func() time.Duration {
	b.Helper()
	root, file := "/sys/fs/cgroup", "cpu.stat"
	if _, err := os.Stat("/sys/fs/cgroup/cpuacct"); err == nil {
		root, file = "/sys/fs/cgroup/cpuacct", "cpuacct.usage"
	}
	own := filepath.Join(root, node.daemon.CgroupParent+"-daemon")
	if err := os.Mkdir(own, 0o755); err != nil {
		b.Fatal(err)
	}
	procs := filepath.Join(own, "cgroup.procs")
	if err := os.WriteFile(procs, []byte(strconv.Itoa(node.daemon.Pid())), 0); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		for end := time.Now().Add(10 * time.Second); os.Remove(own) != nil && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			left, _ := os.ReadFile(procs)
			for _, pid := range strings.Fields(string(left)) {
				_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(pid), 0)
			}
		}
	})
	read := func(dir string) time.Duration {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return 0 // the tasks' own, before the first
		}
		f := strings.Fields(strings.TrimPrefix(string(text), "usage_usec"))
		n, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		if file == "cpu.stat" {
			n *= 1000
		}
		return time.Duration(n)
	}
	return func() time.Duration {
		return read(own) + read(filepath.Join(root, node.daemon.CgroupParent))
	}
}

func ms(d []time.Duration, percent int) float64 {
	d = slices.Sorted(slices.Values(d))
	return float64(d[min(len(d)*percent/100, len(d)-1)].Microseconds()) / 1000
}

func launchOurs(ctx context.Context, r *Runtime, id string) (up, down time.Duration, err error) {
	s := runtime.Spec{
		ID: id, Image: runtimetest.BusyboxRef, Command: []string{"sleep", "1000"},
		CgroupPath: node.daemon.CgroupParent + "/" + id,
		LogDir:     node.daemon.Dir + "/logs/" + id,
		CPUMillis:  1000, MemoryBytes: 64 << 20, PIDs: 64,
	}
	begin := time.Now()
	t, err := r.Create(ctx, s)
	if err != nil {
		return 0, 0, err
	}
	if err := t.Start(ctx); err != nil {
		return 0, 0, err
	}
	up = time.Since(begin)
	begin = time.Now()
	err = r.Remove(ctx, id)
	return up, time.Since(begin), err
}

func launchPlain(ctx context.Context, r *Runtime, id string, creator cio.Creator) (up, down time.Duration, err error) {
	begin := time.Now()
	image, err := r.client.GetImage(ctx, runtimetest.BusyboxRef)
	if err != nil {
		return 0, 0, err
	}
	c, err := r.client.NewContainer(ctx, id,
		client.WithImage(image), client.WithNewSnapshot(id, image),
		client.WithRuntime(shimRuntime, &runcoptions.Options{BinaryName: r.cfg.Runc, Root: r.cfg.RuncRoot}),
		client.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs("sleep", "1000"), oci.WithCgroup("/"+node.daemon.CgroupParent+"/"+id)))
	if err != nil {
		return 0, 0, err
	}
	t, err := c.NewTask(ctx, creator)
	if err != nil {
		return 0, 0, err
	}
	if err := t.Start(ctx); err != nil {
		return 0, 0, err
	}
	up = time.Since(begin)
	begin = time.Now()
	if _, err := t.Delete(ctx, client.WithProcessKill); err != nil {
		return 0, 0, err
	}
	err = c.Delete(ctx, client.WithSnapshotCleanup)
	return up, time.Since(begin), err
}
