// SPDX-License-Identifier: Apache-2.0

// Command bulkhead-log is the logger of one sandbox. The containerd shim starts
// it (URI scheme binary-v2) with the command's stdout on descriptor 3, stderr
// on 4, and on 5 a pipe on which it says that it is ready.
//
// It outlives the agent and containerd. It never stops the command: what cannot
// be written is dropped and counted (see runtime/logs). Its arguments are pairs
// of a key and a value, in any order: dir, max (bytes of a file), files.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

// grace is how long the pipes may stay open after the shim asked us to end. It
// gives up on us after twelve seconds.
const grace = 2 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bulkhead-log:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	// One of these runs for every sandbox: keep it small.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(8 << 20)

	cfg, err := parse(args)
	if err != nil {
		return err
	}
	// A signal to the process group is for the command. SIGPIPE comes from a
	// shim that died.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()

	stdout, err := pipe(3, "stdout")
	if err != nil {
		return err
	}
	stderr, err := pipe(4, "stderr")
	if err != nil {
		return err
	}
	w := logs.OpenWriter(cfg)
	if err := ready(); err != nil {
		return err
	}
	var (
		wg   sync.WaitGroup
		errs [2]error
	)
	wg.Go(func() { errs[0] = w.Pump(ctx, logs.Stdout, stdout, nil, grace) })
	wg.Go(func() { errs[1] = w.Pump(ctx, logs.Stderr, stderr, nil, grace) })
	wg.Wait()
	return errors.Join(errs[0], errs[1], w.Close())
}

func parse(args []string) (logs.Config, error) {
	if len(args)%2 != 0 {
		return logs.Config{}, fmt.Errorf("arguments come in pairs, got %d", len(args))
	}
	var cfg logs.Config
	for i := 0; i < len(args); i += 2 {
		key, value := args[i], args[i+1]
		n, err := strconv.ParseInt(value, 10, 64)
		switch key {
		case "dir":
			cfg.Dir, err = value, nil
		case "max":
			cfg.MaxBytes = n
		case "files":
			cfg.Files = int(n)
		default:
			return logs.Config{}, fmt.Errorf("unknown argument %s", key)
		}
		if err != nil {
			return logs.Config{}, fmt.Errorf("argument %s: %w", key, err)
		}
	}
	if cfg.Dir == "" {
		return logs.Config{}, errors.New("argument dir is missing")
	}
	return cfg, nil
}

// pipe makes an inherited descriptor one whose reads can have a deadline.
func pipe(fd int, name string) (*os.File, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("%s on descriptor %d: %w", name, fd, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// ready tells the shim. Without this byte it takes us for dead.
func ready() error {
	f := os.NewFile(5, "ready")
	if _, err := f.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("ready on descriptor 5: %w", err)
	}
	return f.Close()
}
