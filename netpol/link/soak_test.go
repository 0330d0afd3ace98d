// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	envSoak = "BULKHEAD_LINK_TEST_SOAK" // seed of a child that runs cycles until it is killed

	soakWorkers = 8
	soakAtOnce  = 25 // links of one worker, made and removed in turn
	soakFaults  = 20 // one step in so many fails
)

// TestNothingIsLeaked runs cycles of create, publish, up, use, down and
// remove, eight at a time, of which many are broken off at some step, in
// processes that are killed without warning. After each kill, the next
// process removes what it finds, and nothing may be left.
func TestNothingIsLeaked(t *testing.T) {
	cycles, kills := 200, 5
	deadline, limited := t.Deadline()
	switch {
	case os.Getenv("BULKHEAD_SOAK") != "":
		cycles, kills = 1000, 10
	case limited && time.Until(deadline) < 5*time.Minute: // an emulated guest
		cycles, kills = 24, 2
	}
	m, f := open(t), newFar(t)
	markAll(t)
	must(t, inNetns(f.ns, func() error { return dropTo(netip.MustParseAddr("192.0.2.77")) }))
	start, done, found := time.Now(), 0, 0
	for life := 0; done < cycles; life++ {
		n := soakLife(t, m, life, cycles/kills)
		done += n
		again, err := Open(m.cfg)
		must(t, err)
		must(t, again.VerifyTable())
		ids, err := again.List()
		must(t, err)
		found += len(ids)
		for _, id := range ids {
			must(t, again.Remove(id))
		}
		if got := left(t, again); len(got) != 0 {
			t.Fatalf("after life %d these are left: %q", life, got)
		}
		noElementsLeft(t, again)
		must(t, again.Close())
		if t.Failed() {
			return
		}
	}
	t.Logf("%d cycles in %s; %d links were found half done", done, time.Since(start).Round(time.Millisecond), found)
	if found == 0 {
		t.Error("no kill came in the middle of anything")
	}
}

// soakLife runs a child until it has done some cycles, kills it and answers
// how many it did.
func soakLife(t *testing.T, m *Manager, life, cycles int) (done int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envSoak+"="+strconv.Itoa(life), envDir+"="+m.cfg.NetnsDir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(out)
	for done < cycles && lines.Scan() {
		done++
	}
	must(t, cmd.Process.Kill())
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the child ended with %v before it was killed", err)
	}
	return done
}

// soak runs cycles until it is killed, one line of output each.
func soak(seed string) {
	first, _ := strconv.Atoi(seed)
	m, err := Open(testConfig(os.Getenv(envDir)))
	if err == nil {
		m.fault = func(step string) error {
			if rand.IntN(soakFaults) == 0 {
				return fmt.Errorf("%w at %s", errSoak, step)
			}
			return nil
		}
		var g errgroup.Group
		for w := range uint32(soakWorkers) {
			g.Go(func() error {
				for i := uint32(first); ; i++ {
					if err := soakCycle(m, 1+w*soakAtOnce+i%soakAtOnce); err != nil {
						return err
					}
					fmt.Println("done")
				}
			})
		}
		err = g.Wait()
	}
	fmt.Fprintln(os.Stderr, "soak:", err)
	os.Exit(1)
}

// soakCycle is one life of a link. A step that was broken off on purpose ends
// it early; anything else is an error.
func soakCycle(m *Manager, slot uint32) error {
	a4, _ := AddrFor(pool4, slot)
	a6, _ := AddrFor(pool6, slot)
	l := Link{ID: sandboxID(slot), Slot: slot, Addr4: a4, Addr6: a6}
	broken := func(err error) bool { return err != nil && errors.Is(err, errSoak) }
	_, err := m.Create(context.Background(), l)
	if err == nil {
		err = useLink(m, l)
	}
	if err != nil && !broken(err) {
		return err
	}
	for try := 0; ; try++ {
		switch err := m.Remove(l.ID); {
		case err == nil:
			return nil
		case !broken(err) || try == 100:
			return err
		}
	}
}

// errSoak marks a step that was broken off on purpose.
var errSoak = errors.New("broken off")

func useLink(m *Manager, l Link) error {
	port := uint16(10000 + l.Slot)
	if err := m.Publish(l.ID, []Port{{Host: port, Sandbox: 80, Proto: tcp}, {Host: port, Sandbox: 53, Proto: udp}}); err != nil {
		return err
	}
	if err := m.Up(l.ID); err != nil {
		return err
	}
	if l.Slot%3 != 0 { // a third never has a connection
		ns, err := os.Open(m.NetnsPath(l.ID))
		if err != nil {
			return err
		}
		defer ns.Close()
		for _, network := range []string{"udp4", "udp6"} {
			to := "192.0.2.77:9"
			if network == "udp6" {
				to = "[2001:db8::77]:9"
			}
			c, err := dialFrom(ns, network, to, time.Second)
			if err != nil {
				return err
			}
			_, err = c.Write([]byte("x"))
			if err = errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
	}
	if l.Slot%2 == 0 {
		return m.Down(l.ID)
	}
	return nil
}
