// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// The environment of a process that is there to be killed.
const (
	victimDir   = "BULKHEAD_TEST_VICTIM_DIR"
	victimLinks = "BULKHEAD_TEST_VICTIM_LINKS"
)

func crashConfig(dir string) Config {
	return Config{PinDir: dir, MaxSandboxes: 64, Pools: []netip.Prefix{pool4, pool6}}
}

// crashPrograms are what the victim's sandboxes get in turn.
func crashPrograms() (out [3]netpol.Program) {
	for i := range out {
		p := entries(10 * (i + 1))
		for n := range 5 {
			p.Rules = append(p.Rules, netpol.RuleRef{ID: uint16(n + 1), Tenant: "acme", Name: fmt.Sprintf("p%d-r%d", i, n)})
		}
		p.Rules[0].Rate = 1e9
		p.Rates = []netpol.ProgramRate{tenantRate(1e9), sandboxRate(uint64(i+1) * 1e9)}
		if i > 0 { // the first is asked whether it lets something pass
			p.Budgets = []netpol.ProgramBudget{tenantBudget(), sandboxBudget()}
		}
		out[i] = p
	}
	return out
}

// victim attaches, changes and detaches until it is killed.
func victim(dir, links string) error {
	e, err := Open(crashConfig(dir))
	if err != nil {
		return err
	}
	index := strings.Fields(links)
	programs := crashPrograms()
	fmt.Println("open")
	for i := 0; ; i++ {
		for n := range index {
			var ifindex int
			fmt.Sscan(index[n], &ifindex)
			sb := sandbox(uint32(n+1), ifindex, programs[(i+n)%3])
			err := e.Attach(context.Background(), sb)
			if err == nil {
				err = e.SetPolicy(sb.ID, sb.Slot, programs[(i+n+1)%3], 2, nil)
			}
			if err == nil && (i+n)%2 == 0 {
				err = e.Detach(sb.ID, sb.Slot)
			}
			if err != nil {
				return err
			}
		}
	}
}

// Whenever the process is killed, the next one finds what it can go on with,
// and nothing is lost or left.
func TestKilledAtAnyTime(t *testing.T) {
	dir := pinDir(t)
	ns, index := links(t, 3)
	open(t, crashConfig(dir)).Close()
	rounds := 10
	if testing.Short() {
		rounds = 4
	}
	for round := range rounds {
		cmd := exec.Command("/proc/self/exe", "-test.run=^$")
		cmd.Env = append(os.Environ(), victimDir+"="+dir, victimLinks+"="+strings.Trim(fmt.Sprint(index), "[]"))
		var out strings.Builder
		cmd.Stderr = &out
		stdout, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, in(ns, cmd.Start))
		if round%2 == 1 { // else it may die while it opens, and does on a slow machine
			stdout.Read(make([]byte, 1))
		}
		time.Sleep(time.Duration(20+rand.IntN(300)) * time.Millisecond)
		cmd.Process.Kill()
		err = cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("round %d: the victim ended by itself: %v\n%s", round, err, out.String())
		}

		e, err := Open(crashConfig(dir))
		ok(t, err)
		for n := range index {
			sb := sandbox(uint32(n+1), index[n], crashPrograms()[0])
			ok(t, in(ns, func() error {
				return errors.Join(e.Attach(context.Background(), sb), e.Verify(sb.ID, sb.Slot, sb.Ifindex))
			}))
			if x, err := e.Explain(sb.Slot, netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 443}); err != nil || !x.Allowed || x.Rule != "bench" {
				t.Errorf("round %d: explain: %+v, %v", round, x, err)
			}
			ok(t, e.Detach(sb.ID, sb.Slot))
		}
		if left := remains(t, e); left != "" {
			t.Errorf("round %d: %s", round, left)
		}
		ok(t, e.Close())
	}
	ok(t, open(t, crashConfig(dir)).Purge())
}

// remains says what is still there when all sandboxes are gone.
func remains(t *testing.T, e *Enforcer) string {
	t.Helper()
	ids, err := e.List()
	ok(t, err)
	tries := unused(t, e)
	if n := int(2 * e.cfg.MaxSandboxes); len(ids) != 0 || tries != n {
		return fmt.Sprintf("ids %v, %d of %d policies free", ids, tries, n)
	}
	for _, name := range []string{"links", "rule_names"} {
		var k uint32
		if err := e.maps[name].NextKey(nil, &k); !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Sprintf("map %s is not empty: %d, %v", name, k, err)
		}
	}
	if rates, budgets := e.limits.count(); rates != 0 || budgets > 1 { // a tenant's may stay
		return fmt.Sprintf("%d rates and %d budgets are left", rates, budgets)
	}
	return ""
}

// unused waits until nothing is retired, and answers how many policies could be
// made. It does not wait for the spares: where the kernel waits for each of
// them, as before 6.8, all of a node take it many seconds.
func unused(t *testing.T, e *Enforcer) (n int) {
	t.Helper()
	eventually(t, func() string {
		e.pool.making.Lock() // what is being made is neither free nor spare
		defer e.pool.making.Unlock()
		e.pool.mu.Lock()
		defer e.pool.mu.Unlock()
		n = len(e.pool.free) + len(e.pool.spares)
		if left := len(e.pool.retired); left > 0 {
			return fmt.Sprintf("%d policies are still retired", left)
		}
		return ""
	})
	return n
}
