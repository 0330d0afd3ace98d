// SPDX-License-Identifier: Apache-2.0

package crash

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	starts      = 1000
	startsWidth = 8
	startsKills = 5 // of the agent, in between
)

// TestThousandStarts: a thousand sandboxes whose first instruction is to
// connect where no rule lets them, eight at a time, while the agent is killed
// now and then. Not one packet arrives; every attempt of one that ran is
// counted; and afterwards no link, namespace, address, route, neighbour,
// connection, nft element or pin is left of any of them.
func TestThousandStarts(t *testing.T) {
	n := open(t)
	// The control: the same command reaches a host that a rule allows.
	n.must("run", "--rm", "--tenant", "acme", "--cpus", "500m", "--memory", "64MiB", busybox, "nc", "-w", "2", rig.API4.String(), "80")
	sink, err := rig.OpenCapture(rig.HostLink("far"), rig.FromSandboxes)
	if err != nil {
		t.Fatal(err)
	}

	var next, ran, tried atomic.Int64
	var wg sync.WaitGroup
	for range startsWidth {
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > starts {
					return
				}
				attempts, ok := startOne(n, fmt.Sprintf("start-%d", i))
				if ok {
					ran.Add(1)
				}
				if attempts > 0 {
					tried.Add(1)
				}
			}
		})
	}
	for k := range startsKills {
		for next.Load() < int64((k+1)*starts/(startsKills+1)) {
			time.Sleep(10 * time.Millisecond)
		}
		if err := n.KillAgent(); err != nil {
			t.Error(err)
		}
		n.startAgent()
	}
	wg.Wait()
	t.Logf("%d of %d ran, %d of them were seen to be refused", ran.Load(), starts, tried.Load())
	// Those that met a killed agent are not among them.
	if ran.Load() < starts*9/10 {
		t.Errorf("only %d of %d sandboxes ran", ran.Load(), starts)
	}
	if tried.Load() < ran.Load()*9/10 {
		t.Errorf("only %d of %d sandboxes were refused anything", tried.Load(), ran.Load())
	}
	n.clear()
	got, err := sink.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if got.Packets != 0 {
		t.Errorf("%d packets arrived", got.Packets)
	}
	eventually(t, "nothing of any sandbox is left", func() bool {
		left, err := n.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		return len(left) == 0
	})
	if left, err := n.Inventory(); err != nil || len(left) > 0 {
		t.Errorf("left on the machine: %v, %v", left, err)
	}
	if left := n.Containerd.Leftovers(); len(left) > 0 {
		t.Errorf("left of containers: %q", left)
	}
}

// startOne runs a sandbox, waits until it was refused something, and removes
// it. It dials anew: the agent may be another one.
func startOne(n *node, name string) (refused int, ran bool) {
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Error(err)
		return 0, false
	}
	defer conn.Close()
	client := nodev1.NewNodeClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var id string
	for range 100 { // while there is no agent
		resp, err := client.Create(ctx, &nodev1.CreateRequest{Spec: &sandboxv1.Spec{
			Name: name, Tenant: "acme", Image: busybox,
			Command: []string{"nc", "-w", "5", rig.Forbidden4.String(), "80"},
			Limits:  &sandboxv1.Limits{CpuMillis: 500, MemoryBytes: 16 << 20, Pids: 16},
		}})
		if err == nil {
			id, ran = resp.GetSandbox().GetId(), true
			break
		}
		if strings.Contains(err.Error(), "exists") || strings.Contains(err.Error(), "in use") { // killed after it was admitted
			id = name
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	for range 50 {
		resp, err := client.Get(ctx, &nodev1.GetRequest{Ref: id})
		if err != nil {
			break
		}
		for _, d := range resp.GetDrops() {
			refused += int(d.GetPackets())
		}
		if refused > 0 || resp.GetSandbox().GetState() == sandboxv1.State_STATE_STOPPED {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	for range 100 {
		if _, err := client.Delete(ctx, &nodev1.DeleteRequest{Ref: id, Force: true}); err == nil || strings.Contains(err.Error(), "no such sandbox") {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return refused, ran
}
